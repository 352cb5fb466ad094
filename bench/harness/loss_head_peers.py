"""Implementations for the loss-head benchmark: turnfast, PyTorch, and every installed peer.

Every implementation maps (hidden, head) to the same loss: token-level PPO clip, turn advantages,
token mean. A peer that cannot express it is timed with what it offers; its note says so.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from turnfast.kernels import turn_policy_loss

CLIP = 0.2
CHUNK = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """K turns of L tokens each, N = K L, concatenated."""

    hidden_ND: Tensor
    head_VD: Tensor
    targets_N: Tensor
    advantages_K: Tensor
    old_N: Tensor

    @property
    def turns_N(self) -> Tensor:
        K = self.advantages_K.shape[0]
        turns = torch.arange(K, device=self.targets_N.device)
        return turns.repeat_interleave(self.targets_N.shape[0] // K)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """loss(hidden, head, data) -> (loss, log-probs or None); `policy`: computes the policy loss."""

    name: str
    loss: Callable[[Tensor, Tensor, Data], tuple[Tensor, Tensor | None]]
    note: str = ""
    policy: bool = True


def ppo(logprobs_N: Tensor, data: Data) -> Tensor:
    A_N = data.advantages_K[data.turns_N]
    ratio_N = (logprobs_N - data.old_N).exp()
    return -torch.minimum(ratio_N * A_N, ratio_N.clamp(1 - CLIP, 1 + CLIP) * A_N).mean()


def picked(hidden_CD: Tensor, head_VD: Tensor, targets_C: Tensor) -> Tensor:
    logits_CV = (hidden_CD @ head_VD.T).float()
    return logits_CV.log_softmax(-1).gather(1, targets_C[:, None]).squeeze(1)


def eager(hidden: Tensor, head: Tensor, data: Data) -> tuple[Tensor, Tensor]:
    logprobs_N = picked(hidden, head, data.targets_N)
    return ppo(logprobs_N, data), logprobs_N


def chunked(hidden: Tensor, head: Tensor, data: Data) -> tuple[Tensor, Tensor]:
    parts = [
        checkpoint(picked, x, head, y, use_reentrant=False)
        for x, y in zip(hidden.split(CHUNK), data.targets_N.split(CHUNK), strict=True)
    ]
    logprobs_N = torch.cat(parts)
    return ppo(logprobs_N, data), logprobs_N


def compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(eager, dynamic=False)


def compiled_chunked() -> Callable[..., tuple[Tensor, Tensor]]:
    fast = torch.compile(picked, dynamic=False)

    def loss(hidden: Tensor, head: Tensor, data: Data) -> tuple[Tensor, Tensor]:
        pieces = zip(hidden.split(CHUNK), data.targets_N.split(CHUNK), strict=True)
        parts = [checkpoint(fast, x, head, y, use_reentrant=False) for x, y in pieces]
        logprobs_N = torch.cat(parts)
        return ppo(logprobs_N, data), logprobs_N

    return loss


def turnfast(impl: str) -> Contender:
    def loss(hidden: Tensor, head: Tensor, data: Data) -> tuple[Tensor, Tensor]:
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        out = turn_policy_loss(
            hidden,
            head,
            rows,
            data.targets_N,
            data.turns_N,
            data.advantages_K,
            data.old_N,
            impl=impl,
        )
        return out.loss, out.logprobs

    return Contender(name=f"turnfast {impl}", loss=loss)


def _per_sequence(data: Data, x: Tensor) -> Tensor:
    return x.view(data.advantages_K.shape[0], -1, *x.shape[1:])


def liger_chunked(device: torch.device) -> Contender:
    module = importlib.import_module("liger_kernel.chunked_loss")
    grpo = module.LigerFusedLinearGRPOLoss(
        beta=0.0,
        use_ref_model=False,
        compiled=device.type == "cuda",
        epsilon_low=CLIP,
        epsilon_high=CLIP,
        loss_type="dapo",
    )

    def loss(hidden: Tensor, head: Tensor, data: Data) -> tuple[Tensor, None]:
        tokens_KL = _per_sequence(data, data.targets_N)
        out = grpo(
            _per_sequence(data, hidden),
            head,
            tokens_KL,
            torch.ones_like(tokens_KL),
            data.advantages_K,
            old_per_token_logps=_per_sequence(data, data.old_N),
        )
        return out[0], None

    return Contender(name="liger chunked grpo", loss=loss, note="one advantage per sequence")


def liger_triton() -> Contender:
    module = importlib.import_module("liger_kernel.transformers.grpo_loss")

    def loss(hidden: Tensor, head: Tensor, data: Data) -> tuple[Tensor, None]:
        tokens_KL = _per_sequence(data, data.targets_N)
        logits = _per_sequence(data, hidden @ head.T)
        # its layout has one more position than tokens
        logits = torch.nn.functional.pad(logits, (0, 0, 0, 1))
        each, *_ = module.triton_grpo_loss(
            logits,
            _per_sequence(data, data.old_N),
            None,
            tokens_KL,
            data.advantages_K,
            temperature=1.0,
            beta=0.0,
            eps_low=CLIP,
            eps_high=CLIP,
        )
        return each.mean(), None

    return Contender(name="liger triton_grpo_loss", loss=loss, note="holds all logits")


def arranger(function: Any, names: set[str]) -> Callable[[dict[str, Any]], list[Any]]:
    """Return a function that orders named values as an autograd function's arguments.

    The order of the arguments differs between versions of the peers. Raises ImportError if a
    required argument is not in `names`.
    """
    parameters = list(inspect.signature(function.forward).parameters.values())[1:]
    for parameter in parameters:
        if parameter.name not in names and parameter.default is inspect.Parameter.empty:
            where = f"{function.__module__}.{function.__qualname__}"
            raise ImportError(f"{where} of this version needs {parameter.name!r}")
    return lambda values: [values.get(each.name, each.default) for each in parameters]


def trl() -> Contender:
    try:
        function = importlib.import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction
    except ImportError:
        module = importlib.import_module("trl.trainer.utils")
        function = getattr(module, "_ChunkedLogProbFunction", None)
        if function is None:
            raise ImportError("this trl has no chunked log-prob function") from None
    fixed = {
        "bias": None,
        "temperature": 1.0,
        "chunk_size": 4096,
        "final_logit_softcapping": None,
        "logit_scale": 1.0,
    }
    arranged = arranger(function, {"last_hidden", "weight", "targets", *fixed})

    def loss(hidden: Tensor, head: Tensor, data: Data) -> tuple[Tensor, Tensor]:
        given = {"last_hidden": hidden, "weight": head, "targets": data.targets_N}
        logprobs_N = function.apply(*arranged(given | fixed))[0]
        return ppo(logprobs_N, data), logprobs_N

    return Contender(name="trl chunked log-prob", loss=loss, note="loss outside")


def verl() -> Contender:
    module = importlib.import_module("verl.utils.kernel.linear_cross_entropy")
    fixed = {"temperature": 1.0, "reduction": "none", "dist_process_group": None}
    arranged = arranger(module.LinearCrossEntropy, {"hidden", "weight", "labels", *fixed})

    def loss(hidden: Tensor, head: Tensor, data: Data) -> tuple[Tensor, Tensor]:
        given = {"hidden": hidden, "weight": head, "labels": data.targets_N}
        logprobs_N = module.LinearCrossEntropy.apply(*arranged(given | fixed))[0]
        return ppo(logprobs_N, data), logprobs_N

    return Contender(name="verl linear_cross_entropy", loss=loss, note="loss outside")


def cce(filtered: bool) -> Contender:
    module = importlib.import_module("cut_cross_entropy")
    options: dict[str, Any] = {} if filtered else {"filter_eps": None}

    def loss(hidden: Tensor, head: Tensor, data: Data) -> tuple[Tensor, Tensor]:
        logprobs_N = -module.linear_cross_entropy(
            hidden, head, data.targets_N, reduction="none", **options
        )
        return ppo(logprobs_N, data), logprobs_N

    name = "cut-cross-entropy" + ("" if filtered else " exact")
    return Contender(name=name, loss=loss, note="loss outside" + ", inexact" * filtered)


def quack() -> Contender:
    module = importlib.import_module("quack.linear_cross_entropy")

    def loss(hidden: Tensor, head: Tensor, data: Data) -> tuple[Tensor, None]:
        return module.chunked_linear_cross_entropy(hidden, head, data.targets_N), None

    return Contender(
        name="quack linear ce", loss=loss, note="mean cross-entropy only", policy=False
    )


def contenders(device: torch.device, wanted: set[str] | None) -> tuple[list[Contender], list[str]]:
    """All implementations that can be imported, and a line about each that cannot."""
    cuda = device.type == "cuda"
    makers: dict[str, Callable[[], Contender]] = {
        "torch-eager": lambda: Contender(name="torch eager", loss=eager),
        "torch-chunked": lambda: Contender(name="torch chunked", loss=chunked),
        "torch-compiled": lambda: Contender(name="torch compiled", loss=compiled()),
        "torch-compiled-chunked": lambda: Contender(
            name="torch compiled chunked", loss=compiled_chunked()
        ),
        "liger-chunked": lambda: liger_chunked(device),
        "trl": trl,
    }
    if cuda:
        makers |= {
            "liger-triton": liger_triton,
            "verl": verl,
            "cce": lambda: cce(True),
            "cce-exact": lambda: cce(False),
            "quack": quack,
        }
    impls = ("triton_safe", "triton_anchored", "triton") if cuda else ("cpp", "reference")
    makers |= {impl: (lambda impl=impl: turnfast(impl)) for impl in impls}
    found, missing = [], []
    for key, make in makers.items():
        if wanted and key not in wanted:
            continue
        try:
            found.append(make())
        except ImportError as error:
            missing.append(f"{key}: not timed, {error}")
    return found, missing
