"""The loss head as torch.library operators: real body, fake body, autograd.

The operators take the arguments of the public functions flattened, so that torch.compile sees one
opaque node whose output shapes do not depend on values; checks that need values happen inside. The
arguments of each are said once, as a record: its schema is made from the record's annotations.

An operator that writes to an argument can have no autograd formula. So the one that adds to a sum
of head gradients knows nothing of autograd, and `with_hidden_gradient` tells it what it has found.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from .backends import implementation
from .problem import LogprobsProblem, Outcome, Problem, Vocab, check_indices, compute_dtype
from .records import PolicyRule

NUM_STATS = 11
# Of a product that stays in the caches between its two passes.
BLOCK_ELEMENTS = 1 << 20
RULE_FIELDS = tuple(get_type_hints(PolicyRule))


class PolicyArguments(NamedTuple):
    """The arguments of turn_policy_loss as the operator takes them: the rule as its fields."""

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
        at = RULE_PLACE
        return (*self[:at], *[getattr(self.rule, name) for name in RULE_FIELDS], *self[at + 1 :])

    @classmethod
    def of(cls, flat: tuple[Any, ...]) -> PolicyArguments:
        at, stop = RULE_PLACE, RULE_PLACE + len(RULE_FIELDS)
        rule = PolicyRule(**dict(zip(RULE_FIELDS, flat[at:stop], strict=True)))
        return cls._make((*flat[:at], rule, *flat[stop:]))


RULE_PLACE = PolicyArguments._fields.index("rule")


class LogprobsArguments(NamedTuple):
    """The arguments of linear_logprobs as the operator takes them."""

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
    """The body, of positional arguments, as an operator whose schema is that of the record, after
    which come tensors that it writes to."""
    kinds = get_type_hints(record)
    if kinds.pop("rule", None):
        # In the place of the rule, as PolicyArguments.flat does.
        before, after = record._fields[:RULE_PLACE], record._fields[RULE_PLACE + 1 :]
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
    # A choice of names is a string to an operator.
    return type(get_args(kind)[0]) if get_origin(kind) is Literal else kind


def _policy_loss(*flat: Any) -> tuple[Tensor, ...]:
    given = PolicyArguments.of(flat)
    out = _outcome(given, None)
    return *_figures(given, out), out.d_head_VD.to(given.head_weight.dtype)


def _policy_loss_onto(*flat: Any) -> tuple[Tensor, ...]:
    given, head_grad = PolicyArguments.of(flat[:-1]), flat[-1]
    return _figures(given, _outcome(given, head_grad))


def _outcome(given: PolicyArguments, head_grad: Tensor | None) -> Outcome:
    hidden, head_weight = given.hidden, given.head_weight
    vocab = Vocab.of(head_weight, given.vocab_start, given.group)
    chosen = implementation(given.impl, hidden.device, hidden.dtype, vocab)
    dtype = compute_dtype(hidden.dtype)
    N = given.rows.shape[0]
    weights = given.weights
    if weights is None:
        weights = torch.full((N,), 1.0 / max(N, 1), dtype=dtype, device=hidden.device)

    def cast(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(dtype)

    problem = Problem(
        hidden_TD=hidden,
        head_VD=head_weight,
        vocab=vocab,
        rows_N=given.rows.long(),
        targets_N=given.targets.long(),
        turns_N=given.turns.long(),
        sequences_K=None if given.sequences is None else given.sequences.long(),
        advantages_K=given.advantages.to(dtype),
        weights_N=weights.to(dtype),
        old_N=cast(given.old_logprobs),
        ref_N=cast(given.ref_logprobs),
        sampler_N=cast(given.sampler_logprobs),
        rule=given.rule,
        temperature=given.temperature,
        softcap=given.softcap,
        chunk_tokens=given.chunk_tokens,
        need_hidden=given.need_hidden,
        need_head=given.need_head,
        head_grad_VD=head_grad,
    )
    # The dtypes are chosen here, float32 where it counts: a caller's autocast would undo that.
    with torch.autocast(hidden.device.type, enabled=False):
        return chosen.policy_loss(problem)


def _figures(given: PolicyArguments, out: Outcome) -> tuple[Tensor, ...]:
    figures = (out.loss, out.logprobs_N, out.entropies_N, out.turn_logprobs_K, out.stats)
    # Kept from here to backward: not wider than it will be there.
    return *figures, out.d_hidden_TD.to(given.hidden.dtype)


def _fake_policy_loss(*flat: Any) -> tuple[Tensor, ...]:
    given = PolicyArguments.of(flat)
    hidden, num_tokens = given.hidden, given.rows.shape[0]
    dtype = compute_dtype(hidden.dtype)

    def new(*shape: int | torch.SymInt, dtype: torch.dtype = dtype) -> Tensor:
        return hidden.new_empty(shape, dtype=dtype)

    return (
        new(),
        new(num_tokens),
        new(num_tokens),
        new(given.advantages.shape[0]),
        hidden.new_empty(NUM_STATS, dtype=torch.float64),
        new(*(hidden.shape if given.need_hidden else (0,)), dtype=hidden.dtype),
        new(*(given.head_weight.shape if given.need_head else (0,)), dtype=hidden.dtype),
    )


def _fake_policy_loss_onto(*flat: Any) -> tuple[Tensor, ...]:
    return _fake_policy_loss(*flat[:-1])[:-1]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    given = PolicyArguments.of(inputs)
    ctx.dtypes = given.hidden.dtype, given.head_weight.dtype
    ctx.needs = given.need_hidden, given.need_head
    ctx.num_inputs = len(inputs)
    ctx.save_for_backward(output[5], output[6])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * (ctx.num_inputs - 2)
    if d_loss is None:
        return None, None, *nothing
    grads = tuple(
        _scaled(grad, d_loss, dtype) if need else None
        for grad, dtype, need in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs, strict=True)
    )
    return *grads, *nothing


class _HiddenGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, trained: Tensor, loss: Tensor, d_hidden: Tensor) -> Tensor:
        ctx.save_for_backward(d_hidden)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> Any:  # type: ignore[override]
        (d_hidden,) = ctx.saved_tensors
        if torch.compiler.is_compiling() or d_loss.device.type != "cpu":
            # A look at the factor would stall an accelerator; it shows in the gradient instead.
            d_loss = d_loss.where(d_loss == 1, torch.nan)
        elif d_loss != 1:
            raise ValueError(
                f"head_grad: expected loss.backward() with a factor of 1, got {float(d_loss):g}; "
                "the head's gradient was added to it before: give the factor to weights"
            )
        known = d_hidden.numel() > 0
        return _scaled(d_hidden, d_loss, d_hidden.dtype) if known else None, None, None


def with_hidden_gradient(
    hidden: Tensor, head_weight: Tensor, loss: Tensor, d_hidden: Tensor
) -> Tensor:
    """The loss, whose backward gives d_hidden to hidden and nothing to the head, whose gradient has
    been added up elsewhere."""
    # A loss of the head alone can be differentiated, too; it is then known by the head.
    trained = hidden if hidden.requires_grad else head_weight
    return _HiddenGradient.apply(trained, loss, d_hidden)


def _scaled(grad: Tensor, d_loss: Tensor, dtype: torch.dtype) -> Tensor:
    """grad * d_loss in the model's dtype, without another float32 buffer of the head's size.

    A float32 gradient that needs no factor is handed over as it is, if no later backward will ask
    for it again.
    """
    if torch.compiler.is_compiling() or type(grad) is not Tensor:
        return (grad * d_loss).to(dtype)  # a tracer has no values to ask, and its compiler fuses
    if grad.device.type != "cpu":
        # A GPU writes another dtype directly, and would have to wait for the comparison below.
        return torch.mul(grad, d_loss, out=torch.empty_like(grad, dtype=dtype))
    one = bool(d_loss == 1)
    if grad.dtype == dtype:
        return grad.detach() if one and not _graph_is_kept() else grad * d_loss
    if one:
        return grad.to(dtype)
    # On the CPU torch would make the float32 product whole, and convert it then.
    out = torch.empty_like(grad, dtype=dtype)
    for to, values in zip(_blocks(out), _blocks(grad), strict=True):
        to.copy_(values * d_loss)
    return out


def _blocks(x: Tensor) -> tuple[Tensor, ...]:
    return x.view(-1).split(BLOCK_ELEMENTS)


def _graph_is_kept() -> bool:
    """Whether this backward may run again; true where torch does not say."""
    autograd = getattr(torch._C, "_autograd", None)
    ask = getattr(autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or ask()


def _logprobs(*flat: Any) -> tuple[Tensor, Tensor]:
    given = LogprobsArguments(*flat)
    hidden, head_weight = given.hidden, given.head_weight
    vocab = Vocab.of(head_weight, given.vocab_start, given.group)
    chosen = implementation(given.impl, hidden.device, hidden.dtype, vocab)
    problem = LogprobsProblem(
        hidden_TD=hidden,
        head_VD=head_weight,
        vocab=vocab,
        rows_N=given.rows.long(),
        targets_N=given.targets.long(),
        temperature=given.temperature,
        softcap=given.softcap,
        chunk_tokens=given.chunk_tokens,
    )
    check_indices(hidden, vocab, problem.rows_N, problem.targets_N)
    with torch.autocast(hidden.device.type, enabled=False):
        return chosen.logprobs(problem)


def _fake_logprobs(*flat: Any) -> tuple[Tensor, Tensor]:
    given = LogprobsArguments(*flat)
    dtype = compute_dtype(given.hidden.dtype)
    out = given.hidden.new_empty(given.rows.shape[0], dtype=dtype)
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
