"""Attention over a prefix tree against attention over the same rows unshared, forward and backward.

    python bench/attention.py [--shared 0.6] [--tokens 8192] [--heads 4] [--kv-heads 2] [--width 32]

Groups of 8 rows of random length share a prefix, so that the given share of all tokens is shared.
First the outputs and gradients of both must agree. Operations are counted on the pairs of a query
and a key that see each other, forward 4·d and backward 10·d per pair and head. On CUDA the defaults
are those of a 7B model: 28 heads, 4 key heads, width 128, 32,768 tokens, bf16.
Results go to bench/results/attention_<device>.json.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from turnfast.kernels.attention import (
    PackedRows,
    TreeRows,
    packed_attention,
    pick_backend,
    pick_tree_backend,
    tree_attention,
)
from turnfast.kernels.tree import prefix_tree

RESULTS = Path(__file__).parent / "results"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
GROUP = 8


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=float, default=0.6, help="share of all tokens")
    parser.add_argument("--tokens", type=int, default=32768 if cuda else 8192, help="of all rows")
    parser.add_argument("--row", type=int, default=2048 if cuda else 512, help="mean row length")
    parser.add_argument("--heads", type=int, default=28 if cuda else 4)
    parser.add_argument("--kv-heads", type=int, default=4 if cuda else 2)
    parser.add_argument("--width", type=int, default=128 if cuda else 32)
    parser.add_argument("--window", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=30 if cuda else 7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: shared machine")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if cuda else "cpu")
    result = measure(options, device)
    out = options.out or RESULTS / f"attention_{device.type}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


def make_rows(options: argparse.Namespace) -> list[list[int]]:
    draw = random.Random(0)
    # of G rows of L tokens with a prefix P, the share (G - 1)·P / (G·L) need not be computed
    prefix = round(options.shared * options.row * GROUP / (GROUP - 1))
    if prefix >= options.row:
        raise SystemExit(f"--shared {options.shared}: {GROUP} rows can share at most 7 / 8")
    rows: list[list[int]] = []
    while sum(len(row) for row in rows) < options.tokens:
        first = [draw.randrange(1 << 20) for _ in range(prefix)]
        for _ in range(GROUP):
            own = draw.randrange(1, 2 * (options.row - prefix))
            rows.append(first + [draw.randrange(1 << 20) for _ in range(own)])
    return rows


def measure(options: argparse.Namespace, device: torch.device) -> dict:
    rows = make_rows(options)
    lengths = [len(row) for row in rows]
    tree = prefix_tree(torch.tensor([t for row in rows for t in row]), lengths)
    trees = TreeRows(
        ends_T=tree.ends_T.to(device),
        positions_T=tree.positions_T.to(device),
        backend=pick_tree_backend(device, head_dim=options.width),
    )
    plain = PackedRows(
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int().to(device),
        lengths=tuple(lengths),
        backend=pick_backend(device),
        max_seqlen=max(lengths),
    )
    places = tree.places.to(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    heads = (options.heads, options.kv_heads, options.kv_heads)
    qkv = [
        torch.randn(len(tree.ends_T), h, options.width, device=device, dtype=dtype).transpose(0, 1)
        for h in heads
    ]
    unshared = [x[:, places] for x in qkv]
    scale = options.width**-0.5

    def run(function: Callable, inputs: list[Tensor], layout, d_out: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = function(*leaves, layout, scale=scale, window=options.window)
        out.backward(d_out)
        return [out.detach(), *(x.grad for x in leaves if x.grad is not None)]

    d_plain = torch.randn(len(places), options.heads, options.width, device=device, dtype=dtype)
    d_tree = torch.zeros(len(tree.ends_T), *d_plain.shape[1:], device=device, dtype=torch.float32)
    d_tree = d_tree.index_add_(0, places, d_plain.float()).to(dtype)
    ways = {
        "rows": lambda: run(packed_attention, unshared, plain, d_plain),
        "tree": lambda: run(tree_attention, qkv, trees, d_tree),
    }
    difference = _difference(ways["rows"](), ways["tree"](), places)
    if not difference < (1e-5 if dtype == torch.float32 else 3e-2):
        raise SystemExit(f"tree and rows differ by {difference:.2e} of the largest value")
    clock, times = CLOCKS[options.clock], {way: [] for way in ways}
    for _ in range(options.repeats):
        for way, function in ways.items():
            _wait(device)
            begin = clock()
            function()
            _wait(device)
            times[way].append(clock() - begin)
    pairs = {
        "rows": sum(n * (n + 1) // 2 for n in lengths),
        "tree": int((tree.positions_T + 1).sum()),
    }
    seconds = {way: median(values) for way, values in times.items()}
    return {
        "command": " ".join(["python bench/attention.py", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "clock": options.clock,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": _commit(),
        "backends": {"rows": plain.backend, "tree": trees.backend},
        "tokens": {"rows": len(places), "tree": len(tree.ends_T)},
        "difference": difference,
        "seconds": seconds,
        "speedup": seconds["rows"] / seconds["tree"],
        "speedup_of_pairs": pairs["rows"] / pairs["tree"],
        "tflops": {
            way: 14.0 * options.width * options.heads * pairs[way] / seconds[way] / 1e12
            for way in ways
        },
    }


def _difference(plain: list[Tensor], tree: list[Tensor], places: Tensor) -> float:
    """Largest difference of outputs and gradients, as a share of the largest value of each."""
    expected = [plain[0], *plain[1:]]
    found = [tree[0][places], *tree[1:]]
    for i in (1, 2, 3):  # gradients of a shared token are the sum over its rows
        summed = torch.zeros(found[i].shape, device=places.device, dtype=torch.float32)
        expected[i] = summed.index_add_(1, places, expected[i].float())
    return max(
        float((a.float() - b.float()).abs().max() / a.float().abs().max())
        for a, b in zip(expected, found, strict=True)
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return found.stdout.strip()


if __name__ == "__main__":
    main()
