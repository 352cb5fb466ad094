"""Per-turn sums and broadcasts over flat token tensors.

    N tokens   K segments (turns); the tokens of a segment are contiguous, a segment may be empty

Each is the other's derivative, so both are differentiable any number of times.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from . import reference

__all__ = ["segment_broadcast", "segment_sum"]

NAMES = ("auto", "reference", "triton")


def segment_sum(
    values: Tensor, segments: Tensor, *, num_segments: int, impl: str = "auto"
) -> Tensor:
    """The sum of the values of each segment: [N] floats and [N] segment numbers to [K].

    An absent segment sums to 0. The order of a sum is fixed, so the result repeats bitwise.
    impl: "auto" (triton on CUDA, reference elsewhere), "reference" or "triton".
    Raises ValueError naming the argument.

    Example: segment_sum(tensor([-1.0, -2.0, -0.5]), tensor([0, 0, 2]), num_segments=3)
        is [-3.0, 0.0, -0.5], the log-probs of turns [5, 9], [] and [7].
    """
    _check_values("values", values)
    _check_segments(segments, values)
    if segments.shape != values.shape:
        raise ValueError(
            f"segments: expected shape {list(values.shape)}, got {list(segments.shape)}"
        )
    if not isinstance(num_segments, int | torch.SymInt) or num_segments < 0:
        raise ValueError(f"num_segments: expected an integer >= 0, got {num_segments!r}")
    impl = _resolve(impl, values.device)
    _check_range(segments, num_segments)
    return _sum_op(values, segments, num_segments, impl)


def segment_broadcast(values: Tensor, segments: Tensor, *, impl: str = "auto") -> Tensor:
    """The value of each token's segment: [K] floats and [N] segment numbers to [N].

    impl and errors as in segment_sum.

    Example: segment_broadcast(tensor([0.7, 0.0, -1.2]), tensor([0, 0, 2]))
        is [0.7, 0.7, -1.2], the advantages of turns 0 and 2 on their tokens.
    """
    _check_values("values", values)
    _check_segments(segments, values)
    impl = _resolve(impl, values.device)
    _check_range(segments, values.shape[0])
    return _broadcast_op(values, segments, impl)


def _check_is_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(x).__name__}")


def _check_values(name: str, x: Tensor) -> None:
    _check_is_tensor(name, x)
    if x.ndim != 1 or x.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{name}: expected a vector of float32 or float64, got {list(x.shape)} {x.dtype}"
        )


def _check_segments(segments: Tensor, values: Tensor) -> None:
    _check_is_tensor("segments", segments)
    if segments.ndim != 1 or segments.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"segments: expected a vector of int32 or int64, got {list(segments.shape)} "
            f"{segments.dtype}"
        )
    if segments.device != values.device:
        raise ValueError(f"segments: expected device {values.device}, got {segments.device}")


def _check_range(segments: Tensor, num_segments: int) -> None:
    # On an accelerator the check would wait for the device; the loss head checks its own turns.
    if torch.compiler.is_compiling() or segments.device.type != "cpu" or segments.numel() == 0:
        return
    low, high = int(segments.min()), int(segments.max())
    if low < 0 or high >= num_segments:
        raise ValueError(f"segments: expected 0 <= segment < {num_segments}, got {low} to {high}")
    runs = torch.unique_consecutive(segments)
    if runs.numel() != torch.unique(runs).numel():
        raise ValueError("segments: expected the tokens of a segment to be contiguous")


def _resolve(impl: str, device: torch.device) -> str:
    if impl not in NAMES:
        raise ValueError(f"impl: expected one of {', '.join(NAMES)}, got {impl!r}")
    has_triton = importlib.util.find_spec("triton") is not None
    if impl == "auto":
        return "triton" if device.type == "cuda" and has_triton else "reference"
    if impl == "triton":
        if not has_triton:
            raise ValueError("impl: 'triton' is not available here: triton is not installed")
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(f"impl: 'triton' needs a CUDA device, the tensors are on {device}")
    return impl


def _module(impl: str) -> Any:
    if impl == "reference":
        return reference
    return importlib.import_module(".triton_segments", __package__)


@torch.library.custom_op("turnfast::segment_sum", mutates_args=())
def _sum_op(values: Tensor, segments: Tensor, num_segments: int, impl: str) -> Tensor:
    return _module(impl).segment_sum(values, segments.long(), num_segments)


@_sum_op.register_fake
def _(values: Tensor, segments: Tensor, num_segments: int, impl: str) -> Tensor:
    return values.new_empty(num_segments)


@torch.library.custom_op("turnfast::segment_broadcast", mutates_args=())
def _broadcast_op(values: Tensor, segments: Tensor, impl: str) -> Tensor:
    return _module(impl).segment_broadcast(values, segments.long())


@_broadcast_op.register_fake
def _(values: Tensor, segments: Tensor, impl: str) -> Tensor:
    return values.new_empty(segments.shape[0])


def _sum_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, segments, _, ctx.impl = inputs
    ctx.save_for_backward(segments)


def _sum_backward(ctx: Any, d_sums: Tensor) -> tuple[Tensor, None, None, None]:
    (segments,) = ctx.saved_tensors
    return _broadcast_op(d_sums, segments, ctx.impl), None, None, None


def _broadcast_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, segments, ctx.impl = inputs
    ctx.num_segments = values.shape[0]
    ctx.save_for_backward(segments)


def _broadcast_backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None, None]:
    (segments,) = ctx.saved_tensors
    return _sum_op(d_out, segments, ctx.num_segments, ctx.impl), None, None


_sum_op.register_autograd(_sum_backward, setup_context=_sum_context)
_broadcast_op.register_autograd(_broadcast_backward, setup_context=_broadcast_context)
