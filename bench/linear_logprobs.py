"""Forward-only log-probs compared with one matrix product of 2 N V D flops.

    python bench/linear_logprobs.py [--device cuda|cpu] [--shapes 2048x896x151936,...]
                                    [--dtypes fp32,bf16] [--rounds 5] [--threads 1] [--clock cpu]
                                    [--table FILE]

Shapes, correctness check and result files as in bench/loss_head.py; "of the floor" is the time of
the product in the same run divided by the time of the row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from harness.loss_head_peers import CHUNK, Data, picked
from harness.timing import arguments, begin, finish, medians_s, peak_bytes, sizes
from loss_head import DTYPES, GATE, GATE_TOKENS, SHAPES, make_data
from torch import Tensor
from turnfast.kernels import linear_logprobs

Call = Callable[[Data], Tensor]
FLOOR = "floor: one product"


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--shapes", help="NxDxV, comma separated")
    parser.add_argument("--dtypes", help="of bf16, fp16, fp32, comma separated; CPU: fp32,bf16")
    options, device, clock = begin(parser)
    dtypes = options.dtypes or {"cuda": "bf16", "cpu": "fp32,bf16"}[options.device]
    rows: list[dict[str, Any]] = []
    for N, D, V in sizes(options.shapes or SHAPES[options.device]):
        for dtype in dtypes.split(","):
            rows += bench_shape(N, D, V, dtype, device, options.rounds, clock)
    finish("linear_logprobs", rows, options)


def bench_shape(
    N: int,
    D: int,
    V: int,
    dtype: str,
    device: torch.device,
    rounds: int,
    clock: Callable[[], float],
) -> list[dict[str, Any]]:
    """The rows of one shape."""
    # otherwise the compiled peer exceeds the recompilation limit and runs eagerly
    torch.compiler.reset()
    gate = make_data(min(GATE_TOKENS, N), D, V, DTYPES[dtype], device)
    true_N = picked(gate.hidden_ND.double(), gate.head_VD.double(), gate.targets_N).double()
    errors: dict[str, float] = {}
    contenders: dict[str, Call] = {}
    for name, call in candidates(device).items():
        try:
            errors[name] = float((call(gate).double() - true_N).abs().max())
        except ValueError as error:
            print(f"{name}: not timed, {error}")
            continue
        if name.startswith("turnfast") and not errors[name] <= GATE[dtype][0]:
            raise SystemExit(f"{name} fails the correctness gate {GATE[dtype][0]}: {errors[name]}")
        contenders[name] = call
    data = make_data(N, D, V, DTYPES[dtype], device)
    calls = {name: (lambda call=call: call(data)) for name, call in contenders.items()}
    peaks = {name: peak_bytes(call, device) for name, call in calls.items()}
    calls[FLOOR] = lambda: product(data)
    times = medians_s(calls, rounds, device, clock)
    return [
        {
            "N": N,
            "D": D,
            "V": V,
            "dtype": dtype,
            "what": name,
            "ms": seconds * 1e3,
            "TFLOP/s": 2 * N * V * D / seconds / 1e12,
            "of the floor": times[FLOOR] / seconds,
            "peak MB": peaks[name] / 1e6 if name in peaks else None,
            "log-prob error": errors.get(name),
        }
        for name, seconds in times.items()
    ]


@torch.no_grad()
def eager(data: Data) -> Tensor:
    return picked(data.hidden_ND, data.head_VD, data.targets_N)


@torch.no_grad()
def chunked(data: Data, rule: Callable[..., Tensor] = picked) -> Tensor:
    pieces = zip(data.hidden_ND.split(CHUNK), data.targets_N.split(CHUNK), strict=True)
    return torch.cat([rule(x, data.head_VD, y) for x, y in pieces])


def product(data: Data) -> None:
    for x_CD in data.hidden_ND.split(4096 if data.hidden_ND.is_cuda else 512):
        x_CD @ data.head_VD.T


def candidates(device: torch.device) -> dict[str, Call]:
    """PyTorch and all implementations; unavailable ones fail in the correctness check."""

    def turnfast(impl: str) -> Call:
        def call(data: Data) -> Tensor:
            rows_N = torch.arange(data.targets_N.shape[0], device=device)
            return linear_logprobs(
                data.hidden_ND, data.head_VD, rows_N, data.targets_N, impl=impl
            ).logprobs

        return call

    cuda = device.type == "cuda"
    impls = ("triton_safe", "triton_anchored", "triton") if cuda else ("cpp", "reference")
    compiled = partial(chunked, rule=torch.compile(picked, dynamic=False))
    plain = {"torch eager": eager, "torch chunked": chunked, "torch compiled chunked": compiled}
    return plain | {f"turnfast {impl}": turnfast(impl) for impl in impls}


if __name__ == "__main__":
    main()
