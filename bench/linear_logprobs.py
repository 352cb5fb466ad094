"""Forward-only log-probs against their floor: one product of 2 N V D flops, no [N, V] anywhere.

    python bench/linear_logprobs.py [--device cuda|cpu] [--shapes 2048x896x151936,...]
                                    [--dtype bf16] [--rounds 5] [--table FILE]

Shapes, gate and result files are those of bench/loss_head.py; "of the floor" is the product alone
in the same run over the time of the row.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from loss_head import DTYPES, GATE, GATE_TOKENS, SHAPES, make_data
from loss_head_peers import CHUNK, Data, picked
from timing import environment, medians_s, peak_bytes, save, table
from torch import Tensor
from turnfast.kernels import linear_logprobs

Call = Callable[[Data], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=here, choices=("cuda", "cpu"))
    parser.add_argument("--shapes", help="NxDxV, comma separated")
    parser.add_argument("--dtype", default="bf16" if here == "cuda" else "fp32", choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--table", type=Path, help="print a result file as a table and stop")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.table.read_text(encoding="utf-8"))))
        return
    device = torch.device(options.device)
    rows: list[dict[str, Any]] = []
    for text in (options.shapes or SHAPES[options.device]).split(","):
        N, D, V = (int(n) for n in text.split("x"))
        rows += bench_shape(N, D, V, options.dtype, device, options.rounds)
    command = f"python bench/linear_logprobs.py {shlex.join(sys.argv[1:])}".strip()
    record = {"command": command, "environment": environment(device), "rows": rows}
    print(table(record))
    print(save(f"linear_logprobs_{options.device}_{options.dtype}", record))


def bench_shape(
    N: int, D: int, V: int, dtype: str, device: torch.device, rounds: int
) -> list[dict[str, Any]]:
    """The rows of one shape."""
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
    calls["floor: one product"] = lambda: product(data)
    times = medians_s(calls, rounds, device)
    return [
        {
            "N": N,
            "D": D,
            "V": V,
            "dtype": dtype,
            "what": name,
            "ms": seconds * 1e3,
            "TFLOP/s": 2 * N * V * D / seconds / 1e12,
            "of the floor": times["floor: one product"] / seconds,
            "peak MB": peaks[name] / 1e6 if name in peaks else None,
            "log-prob error": errors.get(name),
        }
        for name, seconds in times.items()
    ]


@torch.no_grad()
def eager(data: Data) -> Tensor:
    return picked(data.hidden_ND, data.head_VD, data.targets_N)


@torch.no_grad()
def chunked(data: Data) -> Tensor:
    pieces = zip(data.hidden_ND.split(CHUNK), data.targets_N.split(CHUNK), strict=True)
    return torch.cat([picked(x, data.head_VD, y) for x, y in pieces])


def product(data: Data) -> None:
    for x_CD in data.hidden_ND.split(4096 if data.hidden_ND.is_cuda else 512):
        x_CD @ data.head_VD.T


def candidates(device: torch.device) -> dict[str, Call]:
    """PyTorch and every implementation; one that is missing here refuses in the gate."""

    def turnfast(impl: str) -> Call:
        def call(data: Data) -> Tensor:
            rows_N = torch.arange(data.targets_N.shape[0], device=device)
            return linear_logprobs(
                data.hidden_ND, data.head_VD, rows_N, data.targets_N, impl=impl
            ).logprobs

        return call

    cuda = device.type == "cuda"
    impls = ("triton_safe", "triton_anchored", "triton") if cuda else ("cpp", "reference")
    return {"torch eager": eager, "torch chunked": chunked} | {
        f"turnfast {impl}": turnfast(impl) for impl in impls
    }


if __name__ == "__main__":
    main()
