"""Random prefix trees, and attention outputs and gradients compared with a reference."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from turnfast.kernels.attention import TreeRows, tree_attention
from turnfast.kernels.attention.tree import reference
from turnfast.kernels.packing.tree import prefix_tree


def random_rows(seed: int, num_rows: int, longest: int, vocab: int = 97) -> list[list[int]]:
    """Draw rows of which most share a prefix with an earlier row, or are a prefix of one."""
    draw = random.Random(seed)
    rows: list[list[int]] = []
    for _ in range(num_rows):
        earlier = draw.choice(rows) if rows and draw.random() < 0.85 else []
        prefix = earlier[: draw.randrange(len(earlier) + 1)]
        fresh = [draw.randrange(vocab) for _ in range(draw.randrange(1, 2 + longest // 2))]
        rows.append((prefix + fresh)[:longest] or [0])
    return rows


def tree_rows(rows: Sequence[list[int]], device: str = "cpu", **options) -> TreeRows:
    tree = prefix_tree(torch.tensor([t for row in rows for t in row]), [len(row) for row in rows])
    ends_T, positions_T = tree.ends_T.to(device), tree.positions_T.to(device)
    return TreeRows(ends_T=ends_T, positions_T=positions_T, **options)


def random_qkv(
    num_tokens: int,
    heads: tuple[int, int],
    width: int,
    *,
    value_width: int = 0,
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """q [H, T, d], k and v [H_kv, T, d] with the strides of a model, where T comes first."""
    torch.manual_seed(seed)
    sizes = ((heads[0], width), (heads[1], width), (heads[1], value_width or width))
    return [torch.randn(num_tokens, H, d).to(device, dtype).transpose(0, 1) for H, d in sizes]


def output_and_gradients(
    function: Callable, qkv: Sequence[Tensor], rows, **options
) -> list[Tensor]:
    """out, dq, dk and dv of an attention function, with a fixed random gradient of the output."""
    leaves = [x.detach().clone().requires_grad_() for x in qkv]
    out = function(*leaves, rows, **options)
    generator = torch.Generator().manual_seed(5)
    out.backward(torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out))
    return [out.detach(), *(x.grad for x in leaves)]


def assert_matches_reference(
    qkv: Sequence[Tensor], rows: TreeRows, *, scale: float, window: int = 0, floor: float = 1e-5
) -> list[Tensor]:
    """Compare tree attention with float64; at most twice the error of the reference in the same
    dtype is allowed, plus `floor`. Returns out, dq, dk and dv."""
    options = {"scale": scale, "window": window}
    found = output_and_gradients(tree_attention, qkv, rows, **options)
    exact = output_and_gradients(reference, [x.double() for x in qkv], rows, **options)
    plain = output_and_gradients(reference, qkv, rows, **options)
    for name, a, b, c in zip(("out", "dq", "dk", "dv"), found, exact, plain, strict=True):
        error, budget = (a - b).abs().max(), 2 * (c - b).abs().max() + floor
        assert error <= budget, f"{name}: {error} > {budget}"
    return found
