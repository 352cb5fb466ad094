"""Per-turn sums and broadcasts against the memory's floor.

    python bench/segments.py [--device cuda|cpu] [--sizes 1000000x4000,...] [--rounds 20]
                             [--threads 1] [--clock cpu] [--table FILE]

A size is N x K: tokens and turns. Correctness first (against float64). The floor of each is a copy
of as many bytes in the same run: the sum reads 12 N bytes (values, int64 segments), the broadcast
reads 8 N and writes 4 N.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from harness.timing import arguments, begin, finish, medians_s, sizes
from torch import Tensor
from turnfast.kernels.segments import segment_broadcast, segment_sum

SIZES = "32768x512,1000000x4000,16000000x20000"
FLOOR = "floor: a copy of 12 N bytes"


def main() -> None:
    parser = arguments(__doc__, rounds=20)
    parser.add_argument("--sizes", default=SIZES, help="NxK, comma separated")
    options, device, clock = begin(parser)
    rows: list[dict[str, Any]] = []
    for N, K in sizes(options.sizes):
        rows += bench_size(N, K, device, options.rounds, clock)
    finish("segments", rows, options)


def bench_size(
    N: int, K: int, device: torch.device, rounds: int, clock: Callable[[], float]
) -> list[dict[str, Any]]:
    """The rows of one size."""
    g = torch.Generator(device=device).manual_seed(0)
    segments_N = torch.randint(K, (N,), generator=g, device=device).sort().values
    values_N = torch.randn(N, generator=g, device=device)
    table_K = torch.randn(K, generator=g, device=device)
    # Written, or all of it would be read from one page of zeros.
    bytes_N = torch.ones(12 * N // 2, dtype=torch.uint8, device=device)
    other_N = torch.empty_like(bytes_N)
    impls = ["reference", "triton"] if device.type == "cuda" else ["reference"]
    true_K = torch.zeros(K, dtype=torch.float64, device=device)
    true_K.index_add_(0, segments_N, values_N.double())
    calls: dict[str, Callable[[], Tensor]] = {}
    for impl in impls:
        sums_K = segment_sum(values_N, segments_N, num_segments=K, impl=impl)
        error = float((sums_K.double() - true_K).abs().max())
        bound = 1e-6 * (N / K) ** 0.5 * 10
        if not error <= bound or not torch.equal(
            segment_broadcast(table_K, segments_N, impl=impl), table_K[segments_N]
        ):
            raise SystemExit(f"{impl} fails the correctness gate: {error:.1e} > {bound:.1e}")
        calls[f"sum, turnfast {impl}"] = lambda impl=impl: segment_sum(
            values_N, segments_N, num_segments=K, impl=impl
        )
        calls[f"broadcast, turnfast {impl}"] = lambda impl=impl: segment_broadcast(
            table_K, segments_N, impl=impl
        )
    calls["sum, torch index_add"] = lambda: torch.zeros(K, device=device).index_add_(
        0, segments_N, values_N
    )
    calls["broadcast, torch indexing"] = lambda: table_K[segments_N]
    calls[FLOOR] = lambda: other_N.copy_(bytes_N)
    times = medians_s(calls, rounds, device, clock)
    floor_s = times[FLOOR]
    return [
        {
            "N": N,
            "K": K,
            "what": name,
            "us": seconds * 1e6,
            "GB/s": 12 * N / seconds / 1e9,
            "of the floor": floor_s / seconds,
        }
        for name, seconds in times.items()
    ]


if __name__ == "__main__":
    main()
