"""The loss head as torch.library operators: implementation, fake implementation, autograd.

Operators take the arguments of the public functions as a flat list. torch.compile sees one opaque
node whose output shapes do not depend on values; checks of values run inside it. A record declares
the arguments of each operator, and its annotations give the schema.

An operator that writes to an argument cannot have an autograd formula. The operator that adds to
head_grad therefore has none, and `with_hidden_gradient` connects its result to autograd.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from .backends import implementation
from .problem import LogprobsProblem, Outcome, Problem, Vocab, compute_dtype
from .records import PolicyRule, PolicyStats
from .values import check_indices

NUM_STATS = len(fields(PolicyStats))
RULE_FIELDS = tuple(get_type_hints(PolicyRule))


class PolicyArguments(NamedTuple):
    """The arguments of the policy loss operator; `flat` replaces the rule by its fields."""

    hidden: Tensor
    head_weight: Tensor
    rows: Tensor
    targets: Tensor
    turns: Tensor
    sequences: Tensor | None
    advantages: Tensor
    old_logprobs: Tensor | None
    weights: Tensor | None
    ref_logprobs: Tensor | None
    sampler_logprobs: Tensor | None
    rule: PolicyRule
    temperature: float
    softcap: float | None
    chunk_tokens: int | None
    group: str
    vocab_start: int
    need_hidden: bool
    need_head: bool
    impl: str

    def flat(self) -> tuple[Any, ...]:
        rule = [getattr(self.rule, name) for name in RULE_FIELDS]
        return (*self[:RULE_INDEX], *rule, *self[RULE_INDEX + 1 :])

    @classmethod
    def of(cls, flat: tuple[Any, ...]) -> PolicyArguments:
        stop = RULE_INDEX + len(RULE_FIELDS)
        rule = PolicyRule(**dict(zip(RULE_FIELDS, flat[RULE_INDEX:stop], strict=True)))
        return cls._make((*flat[:RULE_INDEX], rule, *flat[stop:]))


RULE_INDEX = PolicyArguments._fields.index("rule")


class LogprobsArguments(NamedTuple):
    """The arguments of the log-prob operator."""

    hidden: Tensor
    head_weight: Tensor
    rows: Tensor
    targets: Tensor
    temperature: float
    softcap: float | None
    chunk_tokens: int | None
    group: str
    vocab_start: int
    impl: str


def _operator(
    name: str, body: Callable[..., Any], record: Any, returns: object, written: tuple[str, ...] = ()
) -> Any:
    """Make an operator with the fields of the record as arguments, then the tensors it writes."""
    kinds = get_type_hints(record)
    if kinds.pop("rule", None):
        # The rule's fields take its place, as in PolicyArguments.flat.
        before, after = record._fields[:RULE_INDEX], record._fields[RULE_INDEX + 1 :]
        rule = get_type_hints(PolicyRule)
        kinds = {name: (kinds | rule)[name] for name in (*before, *RULE_FIELDS, *after)}
    kinds |= dict.fromkeys(written, Tensor)
    parameters = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=_plain(kind))
        for name, kind in kinds.items()
    ]

    def prototype() -> None: ...

    prototype.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        parameters, return_annotation=returns
    )
    schema = torch.library.infer_schema(prototype, mutates_args=written)
    return torch.library.custom_op(name, body, mutates_args=written, schema=schema)


def _plain(kind: Any) -> Any:
    # An operator schema has no Literal, only its type.
    return type(get_args(kind)[0]) if get_origin(kind) is Literal else kind


def _policy_loss(*flat: Any) -> tuple[Tensor, ...]:
    arguments = PolicyArguments.of(flat)
    out = _compute(arguments, None)
    return *_outputs(arguments, out), out.d_head_VD.to(arguments.head_weight.dtype)


def _policy_loss_onto(*flat: Any) -> tuple[Tensor, ...]:
    arguments, head_grad = PolicyArguments.of(flat[:-1]), flat[-1]
    return _outputs(arguments, _compute(arguments, head_grad))


def _compute(arguments: PolicyArguments, head_grad: Tensor | None) -> Outcome:
    hidden, head_weight = arguments.hidden, arguments.head_weight
    vocab = Vocab.of(head_weight, arguments.vocab_start, arguments.group)
    chosen = implementation(arguments.impl, hidden.device, hidden.dtype, vocab.group is not None)
    dtype = compute_dtype(hidden.dtype)
    N = arguments.rows.shape[0]
    weights = arguments.weights
    if weights is None:
        weights = torch.full((N,), 1.0 / max(N, 1), dtype=dtype, device=hidden.device)

    def cast(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(dtype)

    problem = Problem(
        hidden_TD=hidden,
        head_VD=head_weight,
        vocab=vocab,
        rows_N=arguments.rows.long(),
        targets_N=arguments.targets.long(),
        turns_N=arguments.turns.long(),
        sequences_K=None if arguments.sequences is None else arguments.sequences.long(),
        advantages_K=arguments.advantages.to(dtype),
        weights_N=weights.to(dtype),
        old_N=cast(arguments.old_logprobs),
        ref_N=cast(arguments.ref_logprobs),
        sampler_N=cast(arguments.sampler_logprobs),
        rule=arguments.rule,
        temperature=arguments.temperature,
        softcap=arguments.softcap,
        chunk_tokens=arguments.chunk_tokens,
        need_hidden=arguments.need_hidden,
        need_head=arguments.need_head,
        head_grad_VD=head_grad,
    )
    # The implementations choose their dtypes; the autocast of a caller would change them.
    with torch.autocast(hidden.device.type, enabled=False):
        return chosen.policy_loss(problem)


def _outputs(arguments: PolicyArguments, out: Outcome) -> tuple[Tensor, ...]:
    outputs = (out.loss, out.logprobs_N, out.entropies_N, out.turn_logprobs_K, out.stats)
    # Saved until backward, so in the model's dtype.
    return *outputs, out.d_hidden_TD.to(arguments.hidden.dtype)


def _fake_policy_loss(*flat: Any) -> tuple[Tensor, ...]:
    arguments = PolicyArguments.of(flat)
    hidden, num_tokens = arguments.hidden, arguments.rows.shape[0]
    dtype = compute_dtype(hidden.dtype)

    def new(*shape: int | torch.SymInt, dtype: torch.dtype = dtype) -> Tensor:
        return hidden.new_empty(shape, dtype=dtype)

    return (
        new(),
        new(num_tokens),
        new(num_tokens),
        new(arguments.advantages.shape[0]),
        hidden.new_empty(NUM_STATS, dtype=torch.float64),
        new(*(hidden.shape if arguments.need_hidden else (0,)), dtype=hidden.dtype),
        new(*(arguments.head_weight.shape if arguments.need_head else (0,)), dtype=hidden.dtype),
    )


def _fake_policy_loss_onto(*flat: Any) -> tuple[Tensor, ...]:
    return _fake_policy_loss(*flat[:-1])[:-1]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    arguments = PolicyArguments.of(inputs)
    ctx.needs = arguments.need_hidden, arguments.need_head
    ctx.num_inputs = len(inputs)
    ctx.save_for_backward(output[5], output[6])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * (ctx.num_inputs - 2)
    if d_loss is None:
        return None, None, *nothing
    grads = tuple(
        _scaled(grad, d_loss) if need else None
        for grad, need in zip(ctx.saved_tensors, ctx.needs, strict=True)
    )
    return *grads, *nothing


class _HiddenGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, leaf: Tensor, loss: Tensor, d_hidden: Tensor) -> Tensor:
        ctx.save_for_backward(d_hidden)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> Any:  # type: ignore[override]
        (d_hidden,) = ctx.saved_tensors
        if torch.compiler.is_compiling() or d_loss.device.type != "cpu":
            # A test of the factor would synchronise with the host. A wrong factor gives NaN.
            d_loss = d_loss.where(d_loss == 1, torch.nan)
        elif d_loss != 1:
            raise ValueError(
                f"head_grad: expected loss.backward() with a factor of 1, got {float(d_loss):g}; "
                "the forward pass added the head's gradient already: scale weights instead"
            )
        if not d_hidden.numel():
            return None, None, None
        return _scaled(d_hidden, d_loss), None, None


def with_hidden_gradient(
    hidden: Tensor, head_weight: Tensor, loss: Tensor, d_hidden: Tensor
) -> Tensor:
    """Return the loss with a backward that gives d_hidden to hidden and nothing to head_weight."""
    # If only the head requires a gradient, the loss has to be differentiable by the head.
    leaf = hidden if hidden.requires_grad else head_weight
    return _HiddenGradient.apply(leaf, loss, d_hidden)


def _scaled(grad: Tensor, d_loss: Tensor) -> Tensor:
    """Return grad * d_loss.

    On the CPU a factor of 1 returns the gradient itself, without a second buffer of its size,
    unless the graph is kept for another backward pass.
    """
    # A tracer has no values, and a GPU would synchronise with the host for this one.
    has_value = type(grad) is Tensor and grad.device.type == "cpu"
    if has_value and not torch.compiler.is_compiling() and d_loss == 1 and not _graph_is_kept():
        return grad.detach()
    return grad * d_loss


def _graph_is_kept() -> bool:
    """Return whether this backward may run again; true where torch cannot tell."""
    autograd = getattr(torch._C, "_autograd", None)
    ask = getattr(autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or ask()


def _logprobs(*flat: Any) -> tuple[Tensor, Tensor]:
    arguments = LogprobsArguments(*flat)
    hidden, head_weight = arguments.hidden, arguments.head_weight
    vocab = Vocab.of(head_weight, arguments.vocab_start, arguments.group)
    chosen = implementation(arguments.impl, hidden.device, hidden.dtype, vocab.group is not None)
    problem = LogprobsProblem(
        hidden_TD=hidden,
        head_VD=head_weight,
        vocab=vocab,
        rows_N=arguments.rows.long(),
        targets_N=arguments.targets.long(),
        temperature=arguments.temperature,
        softcap=arguments.softcap,
        chunk_tokens=arguments.chunk_tokens,
    )
    check_indices(problem)
    with torch.autocast(hidden.device.type, enabled=False):
        return chosen.logprobs(problem)


def _fake_logprobs(*flat: Any) -> tuple[Tensor, Tensor]:
    arguments = LogprobsArguments(*flat)
    dtype = compute_dtype(arguments.hidden.dtype)
    out = arguments.hidden.new_empty(arguments.rows.shape[0], dtype=dtype)
    return out, torch.empty_like(out)


_Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
_Seven = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
policy_loss_op = _operator("turnfast::turn_policy_loss", _policy_loss, PolicyArguments, _Seven)
policy_loss_op.register_fake(_fake_policy_loss)
policy_loss_op.register_autograd(_backward, setup_context=_setup_context)
policy_loss_onto_op = _operator(
    "turnfast::turn_policy_loss_onto", _policy_loss_onto, PolicyArguments, _Six, ("head_grad",)
)
policy_loss_onto_op.register_fake(_fake_policy_loss_onto)
logprobs_op = _operator(
    "turnfast::linear_logprobs", _logprobs, LogprobsArguments, tuple[Tensor, Tensor]
)
logprobs_op.register_fake(_fake_logprobs)
