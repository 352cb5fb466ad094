"""The gradient of the output projection over micro-batches: in one buffer, or summed by autograd.

    python bench/head_gradient.py [--device cuda|cpu] [--shapes 512x896x151936,...]
                                  [--dtypes fp32,bf16] [--microbatches 2] [--rounds 5]
                                  [--threads 1] [--clock cpu] [--table FILE]

A shape is N x D x V; the N tokens are split into micro-batches. A row is forward and backward of
all of them, as in one optimizer step. The gradient of the head is float32 with head_grad and has
the dtype of the head otherwise; "its size" is the size of that gradient. Errors are relative in
norm, for a few tokens of the same shape, against float64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from harness.loss_head_peers import CLIP, Data
from harness.timing import arguments, begin, finish, medians_s, peak_bytes, sizes
from loss_head import DTYPES, GATE, GATE_TOKENS, make_data
from torch import Tensor
from turnfast.kernels import PolicyRule, turn_policy_loss

SHAPES = {"cuda": "8192x1536x151936", "cpu": "512x896x151936"}


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--shapes", help="NxDxV, comma separated")
    parser.add_argument("--dtypes", default="fp32,bf16", help="of bf16, fp16, fp32")
    parser.add_argument("--microbatches", type=int, default=2)
    options, device, clock = begin(parser)
    rows: list[dict[str, Any]] = []
    for N, D, V in sizes(options.shapes or SHAPES[options.device]):
        for dtype in options.dtypes.split(","):
            count = options.microbatches
            rows += bench_shape(N, D, V, dtype, count, device, options.rounds, clock)
    finish("head_gradient", rows, options)


def bench_shape(
    N: int,
    D: int,
    V: int,
    dtype: str,
    count: int,
    device: torch.device,
    rounds: int,
    clock: Callable[[], float],
) -> list[dict[str, Any]]:
    """The rows of one shape."""
    errors = gradient_errors(make_data(min(GATE_TOKENS, N), D, V, DTYPES[dtype], device), count)
    for name, error in errors.items():
        if not error <= GATE[dtype][1]:
            raise SystemExit(f"{name} fails the correctness gate {GATE[dtype][1]}: {error}")
    data = make_data(N, D, V, DTYPES[dtype], device)
    calls = {name: partial(way, data, count) for name, way in WAYS.items()}
    for call in calls.values():
        call()  # allocate persistent workspaces
    peaks = {name: peak_bytes(call, device) for name, call in calls.items()}
    times = medians_s(calls, rounds, device, clock)
    size = DTYPES[dtype].itemsize
    return [
        {
            "N": N,
            "D": D,
            "V": V,
            "dtype": dtype,
            "micro-batches": count,
            "what": name,
            "ms": seconds * 1e3,
            "peak MB": peaks[name] / 1e6,
            "its size, MB": V * D * (4 if name == ONTO else size) / 1e6,
            "gradient error": errors[name],
        }
        for name, seconds in times.items()
    ]


def by_autograd(data: Data, count: int) -> Tensor:
    head_VD = data.head_VD.detach().requires_grad_()
    for part in range(count):
        loss_of(data, part, count, head_VD).backward()
    assert head_VD.grad is not None
    return head_VD.grad


def onto_one_buffer(data: Data, count: int) -> Tensor:
    head_VD = data.head_VD.detach().requires_grad_()
    head_grad = torch.zeros(head_VD.shape, dtype=torch.float32, device=head_VD.device)
    for part in range(count):
        loss_of(data, part, count, head_VD, head_grad=head_grad).backward()
    assert head_VD.grad is None
    return head_grad


ONTO = "onto head_grad"
WAYS = {"added up by autograd": by_autograd, ONTO: onto_one_buffer}


def loss_of(data: Data, part: int, count: int, head_VD: Tensor, **options: Any) -> Tensor:
    """The loss of one micro-batch, with the token weights of the whole batch."""
    N = len(data.targets_N)
    here = slice(N * part // count, N * (part + 1) // count)
    hidden = data.hidden_ND[here].to(head_VD.dtype).detach().requires_grad_()
    given = (data.targets_N[here], data.turns_N[here], data.advantages_K, data.old_N[here])
    rows = torch.arange(len(hidden), device=hidden.device)
    weights = torch.full_like(data.old_N[here], 1.0 / N)
    rule = PolicyRule(clip_low=CLIP, clip_high=CLIP)
    return turn_policy_loss(
        hidden, head_VD, rows, *given, weights=weights, rule=rule, **options
    ).loss


def gradient_errors(data: Data, count: int) -> dict[str, float]:
    head_VD = data.head_VD.double().requires_grad_()
    loss_of(data, 0, 1, head_VD, impl="reference").backward()
    true = head_VD.grad
    assert true is not None
    return {
        name: float((way(data, count).double() - true).norm() / true.norm())
        for name, way in WAYS.items()
    }


if __name__ == "__main__":
    main()
