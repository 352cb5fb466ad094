"""Checks of the public arguments that need no tensor values: types, shapes, dtypes, devices.

A compiler can trace them. `values.py` checks what needs values.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .problem import compute_dtype
from .records import PolicyRule

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INTS = (torch.int32, torch.int64)
# A compiler traces numbers as symbols.
INTEGERS = (int, torch.SymInt)
NUMBERS = (*INTEGERS, float, torch.SymFloat)


def check_options(
    temperature: float,
    softcap: float | None,
    chunk_tokens: int | None,
    vocab_start: int,
    impl: str,
) -> None:
    # Comparisons instead of isfinite, which a compiler cannot trace for a symbol.
    if not isinstance(temperature, NUMBERS) or not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a finite number > 0, got {temperature!r}")
    if softcap is not None and (not isinstance(softcap, NUMBERS) or not 0 < softcap < math.inf):
        raise ValueError(f"softcap: expected a finite number > 0 or None, got {softcap!r}")
    if chunk_tokens is not None and (not isinstance(chunk_tokens, INTEGERS) or chunk_tokens < 1):
        raise ValueError(f"chunk_tokens: expected an integer >= 1 or None, got {chunk_tokens!r}")
    if not isinstance(vocab_start, INTEGERS):
        raise ValueError(f"vocab_start: expected an integer, got {vocab_start!r}")
    if not isinstance(impl, str):
        raise ValueError(f"impl: expected a name, got {impl!r}")


def check_head(hidden: Tensor, head_weight: Tensor, rows: Tensor, targets: Tensor) -> int:
    """Check the tensors of the head and return N."""
    for name, x in (("hidden", hidden), ("head_weight", head_weight), ("rows", rows)):
        _check_dense(name, x)
    if hidden.ndim != 2 or hidden.dtype not in FLOATS:
        raise ValueError(
            f"hidden: expected [T, D] of a floating dtype, got {list(hidden.shape)} {hidden.dtype}"
        )
    if head_weight.ndim != 2 or head_weight.shape[0] == 0:
        raise ValueError(f"head_weight: expected [V, D] with V >= 1, got {list(head_weight.shape)}")
    _check("head_weight", head_weight, hidden, (*head_weight.shape[:1], *hidden.shape[1:]), FLOATS)
    if head_weight.dtype != hidden.dtype:
        raise ValueError(
            f"head_weight: expected the dtype of hidden, {hidden.dtype}, got {head_weight.dtype}"
        )
    if rows.ndim != 1:
        raise ValueError(f"rows: expected shape [N], got {list(rows.shape)}")
    N = rows.shape[0]
    _check("rows", rows, hidden, (N,), INTS)
    _check("targets", targets, hidden, (N,), INTS)
    return N


def check_policy_tensors(
    hidden: Tensor,
    N: int,
    turns: Tensor,
    advantages: Tensor,
    sequences: Tensor | None,
    per_token: dict[str, Tensor | None],
    rule: PolicyRule,
) -> None:
    """Check the tensors of the policy loss and that the rule has the ones it needs."""
    _check("turns", turns, hidden, (N,), INTS)
    _check_dense("advantages", advantages)
    if advantages.ndim != 1:
        raise ValueError(f"advantages: expected shape [K], got {list(advantages.shape)}")
    _check("advantages", advantages, hidden, advantages.shape, FLOATS)
    for name, values in per_token.items():
        if values is not None:
            _check(name, values, hidden, (N,), FLOATS)
    if sequences is not None:
        _check("sequences", sequences, hidden, advantages.shape, INTS)
    if not isinstance(rule, PolicyRule):
        raise ValueError(f"rule: expected a PolicyRule, got {type(rule).__name__}")
    if rule.ratio == "sequence" and sequences is None:
        raise ValueError("sequences: expected the sequence of each turn [K] for ratio='sequence'")
    if rule.kl_coef and per_token["ref_logprobs"] is None:
        raise ValueError(f"ref_logprobs: expected with kl_coef={rule.kl_coef}")
    has_sampler = per_token["sampler_logprobs"] is not None
    if rule.is_cap is not None and not has_sampler:
        raise ValueError(f"sampler_logprobs: expected with is_cap={rule.is_cap}")
    if rule.is_cap is None and has_sampler:
        raise ValueError("sampler_logprobs: given, but ignored because rule.is_cap is None")


def check_head_grad(head_grad: Tensor, head_weight: Tensor) -> None:
    dtypes = (compute_dtype(head_weight.dtype),)
    _check("head_grad", head_grad, head_weight, tuple(head_weight.shape), dtypes)
    if not head_grad.is_contiguous():
        raise ValueError("head_grad: expected a contiguous tensor")
    if head_grad.requires_grad:
        raise ValueError("head_grad: expected a tensor that requires no gradient itself")
    if not head_weight.requires_grad:
        raise ValueError("head_grad: given, but head_weight requires no gradient to be added to it")


def _check_dense(name: str, x: object) -> None:
    if not isinstance(x, Tensor) or x.layout != torch.strided:
        kind = f"one of layout {x.layout}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name}: expected a dense tensor, got {kind}")


def _check(
    name: str, x: Tensor, like: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    _check_dense(name, x)
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(x.shape)}")
    if x.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name}: expected a dtype of {names}, got {x.dtype}")
    if x.device != like.device:
        raise ValueError(f"{name}: expected device {like.device} like hidden, got {x.device}")
