"""Attention over a prefix tree and over the same rows without sharing, forward and backward.

    python bench/attention.py [--pack-tokens 4096] [--share 0.6] [--groups 2] [--group-size 8]
                              [--heads 4] [--kv-heads 2] [--width 32] [--threads 1] [--clock cpu]
                              [--table FILE]

The tree has --pack-tokens distinct tokens: groups of rollouts that share a prompt, with the given
share of shared tokens (harness/synthetic.py). On CUDA the defaults are the heads of a 7B model (28
query heads, 4 key heads, width 128) and 32,768 tokens in bf16. First the outputs and gradients of
both are compared.

Work is counted in visible query-key pairs: 4·d operations per pair and head in the forward pass,
10·d in the backward pass. "pairs saved" is the ratio of pairs, rows to tree; "speed-up" is the
ratio of times, and "per pair" is speed-up divided by pairs saved.

The number of saved pairs depends on the position of the shared tokens. G rows of equal length L
that share a prefix of x·L tokens save a share s = x·(G - 1) / G of the tokens, and a factor of

    1 / (1 - x² · (G - 1) / G)      for s = 0.6:  G = 3: 2.2   G = 4: 1.9   G = 8: 1.7   G = 16: 1.6

in pairs, because the tokens at the end of a row, which attend to the most keys, are not shared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from harness.synthetic import rows_of, synthesize
from harness.timing import arguments, begin, finish, medians_s
from torch import Tensor
from turnfast.kernels.attention import (
    PackedRows,
    TreeRows,
    packed_attention,
    pick_backend,
    pick_tree_backend,
    tree_attention,
)
from turnfast.kernels.packing.tree import prefix_tree

SIZES = {
    "cuda": {"pack_tokens": 32_768, "groups": 4, "heads": 28, "kv_heads": 4, "width": 128},
    "cpu": {"pack_tokens": 4096, "groups": 2, "heads": 4, "kv_heads": 2, "width": 32},
}
GATE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
SPEED = 2.0  # least speed-up of a tree over rows on a GPU


def main() -> None:
    parser = arguments(__doc__, rounds=7)
    parser.add_argument("--share", type=float, default=0.6, help="of all tokens")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--window", type=int, default=0)
    for name in SIZES["cpu"]:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    options, device, clock = begin(parser)
    for name, size in SIZES[device.type].items():
        if getattr(options, name) is None:
            setattr(options, name, size)
    rows = measure(options, device, clock)
    finish("attention", rows, options)
    if device.type == "cuda":
        met = "met" if rows[1]["speed-up"] >= SPEED else "not met"
        print(f"speed-up {rows[1]['speed-up']:.2f}, wanted {SPEED}: {met}")


def measure(options: Any, device: torch.device, clock: Callable[[], float]) -> list[dict[str, Any]]:
    """Measure rows and tree; returns one table row each."""
    recording = synthesize(
        pack_tokens=options.pack_tokens,
        share=options.share,
        groups=options.groups,
        group_size=options.group_size,
    )
    rows = rows_of(recording)
    lengths = [len(row) for row in rows]
    tree = prefix_tree(torch.tensor([t for row in rows for t in row]), lengths)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    trees = TreeRows(
        ends_T=tree.ends_T.to(device),
        positions_T=tree.positions_T.to(device),
        backend=pick_tree_backend(device, head_dim=options.width),
    )
    plain = PackedRows(
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int().to(device),
        lengths=tuple(lengths),
        backend=pick_backend(device, head_dim=options.width, dtype=dtype),
        max_seqlen=max(lengths),
    )
    places = tree.places.to(device)
    torch.manual_seed(0)
    heads = (options.heads, options.kv_heads, options.kv_heads)
    qkv = [
        torch.randn(len(tree.ends_T), h, options.width, device=device, dtype=dtype).transpose(0, 1)
        for h in heads
    ]
    unshared = [x[:, places] for x in qkv]
    scale = options.width**-0.5

    def run(function: Callable, inputs: list[Tensor], layout: Any, d_out: Tensor) -> list[Tensor]:
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
    if not difference < GATE[dtype]:
        raise SystemExit(f"tree and rows differ by {difference:.2e} of the largest value")
    seconds = medians_s(ways, options.rounds, device, clock)
    pairs = {
        "rows": sum(_pairs(torch.arange(n), options.window) for n in lengths),
        "tree": _pairs(tree.positions_T, options.window),
    }
    backends = {"rows": plain.backend, "tree": trees.backend}
    tokens = {"rows": len(places), "tree": len(tree.ends_T)}
    return [
        {
            "what": way,
            "backend": backends[way],
            "tokens": tokens[way],
            "pairs": pairs[way],
            "ms": seconds[way] * 1e3,
            "TFLOP/s": 14.0 * options.width * options.heads * pairs[way] / seconds[way] / 1e12,
            "speed-up": seconds["rows"] / seconds[way],
            "pairs saved": pairs["rows"] / pairs[way],
            "per pair": seconds["rows"] / seconds[way] * pairs[way] / pairs["rows"],
            "difference": difference if way == "tree" else 0.0,
        }
        for way in ways
    ]


def _pairs(positions: Tensor, window: int) -> int:
    """Number of keys that queries at these depths attend to."""
    return int((positions + 1).clamp(max=window or 1 << 40).sum())


def _difference(plain: list[Tensor], tree: list[Tensor], places: Tensor) -> float:
    """Largest difference of outputs and gradients, relative to the largest value of each."""
    expected = [plain[0], *plain[1:]]
    found = [tree[0][places], *tree[1:]]
    for i in (1, 2, 3):  # gradients of a shared token are the sum over its rows
        summed = torch.zeros(found[i].shape, device=places.device, dtype=torch.float32)
        expected[i] = summed.index_add_(1, places, expected[i].float())
    return max(
        float((a.float() - b.float()).abs().max() / a.float().abs().max())
        for a, b in zip(expected, found, strict=True)
    )


if __name__ == "__main__":
    main()
