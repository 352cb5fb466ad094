"""Block lists against the pairs that see each other, and the Triton kernels in the interpreter."""

from __future__ import annotations

import os
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from turnfast.kernels.attention import TreeRows, tree_attention
from turnfast.kernels.attention.block_lists import Blocks, block_lists
from turnfast.kernels.attention.tree import reference
from turnfast.kernels.packing.tree import prefix_tree

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
)


def random_tree(seed: int, rows: int, longest: int, **options) -> TreeRows:
    draw = random.Random(seed)
    made: list[list[int]] = []
    for _ in range(rows):
        before = draw.choice(made) if made and draw.random() < 0.85 else []
        keep = before[: draw.randrange(len(before) + 1)]
        made.append((keep + [draw.randrange(9) for _ in range(1 + longest // 2)])[:longest])
    tree = prefix_tree(torch.tensor([t for row in made for t in row]), [len(row) for row in made])
    return TreeRows(ends_T=tree.ends_T, positions_T=tree.positions_T, **options)


def attend(function, qkv, rows, **options):
    leaves = [x.clone().requires_grad_() for x in qkv]
    out = function(*leaves, rows, **options)
    generator = torch.Generator().manual_seed(5)
    out.backward(torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype))
    return [out.detach(), *(x.grad for x in leaves)]


def matrix(blocks: Blocks, columns: int) -> torch.Tensor:
    dense = torch.zeros(len(blocks.offsets) - 1, columns, dtype=torch.bool)
    counts = blocks.offsets.diff().long()
    dense[torch.arange(len(counts)).repeat_interleave(counts), blocks.items.long()] = True
    return dense


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    shape=st.sampled_from([(1, 3), (5, 20), (14, 30)]),
    blocks=st.sampled_from([(4, 4), (8, 4), (4, 16), (64, 64)]),
    window=st.sampled_from([0, 1, 3, 10]),
)
def test_the_lists_hold_what_is_seen(seed, shape, blocks, window):
    rows = random_tree(seed, *shape)
    length = len(rows.ends_T)
    place = torch.arange(length)
    seen = (place[None] <= place[:, None]) & (place[:, None] < rows.ends_T[None])
    if window:
        seen &= rows.positions_T[:, None] - rows.positions_T[None] < window
    lists = block_lists(rows.ends_T, rows.positions_T, *blocks, window)
    spans = [range(0, length, size) for size in blocks]
    some = torch.tensor(
        [[seen[q : q + blocks[0], k : k + blocks[1]].any() for k in spans[1]] for q in spans[0]]
    )
    every = torch.tensor(
        [[seen[q : q + blocks[0], k : k + blocks[1]].all() for k in spans[1]] for q in spans[0]]
    )
    whole = matrix(lists.whole_keys, len(spans[1]))
    mixed = matrix(lists.mixed_keys, len(spans[1]))
    assert torch.equal(whole, matrix(lists.whole_queries, len(spans[0])).T)
    assert torch.equal(mixed, matrix(lists.mixed_queries, len(spans[0])).T)
    assert not (whole & mixed).any() and not (whole & ~every).any()
    if window:  # depths of a block are only known by their extremes
        assert not (some & ~whole & ~mixed).any()
    else:
        assert torch.equal(whole | mixed, some)


@interpreted
@pytest.mark.triton
@pytest.mark.parametrize(
    ("seed", "shape", "heads", "width", "window"),
    [
        (0, (1, 1), (1, 1), 16, 0),
        (1, (6, 60), (2, 1), 32, 0),
        (2, (5, 90), (2, 2), 20, 9),
        (3, (5, 100), (2, 1), 64, 0),
        (4, (3, 150), (2, 1), 128, 40),
        (5, (9, 40), (3, 1), 80, 1),
    ],
)
def test_equals_every_score_computed(seed, shape, heads, width, window):
    rows = random_tree(seed, *shape, backend="triton")
    length = len(rows.ends_T)
    torch.manual_seed(seed)
    # as a model hands them over: heads in the middle, the last dimension contiguous
    q = torch.randn(length, heads[0], width).transpose(0, 1)
    k, v = (torch.randn(length, heads[1], width).transpose(0, 1) for _ in range(2))
    options = {"scale": width**-0.5, "window": window}
    got = attend(tree_attention, (q, k, v), rows, **options)
    truth = attend(reference, (q.double(), k.double(), v.double()), rows, **options)
    plain = attend(reference, (q, k, v), rows, **options)
    for name, a, b, c in zip(("out", "dq", "dk", "dv"), got, truth, plain, strict=True):
        error, budget = (a - b).abs().max(), 2 * (c - b).abs().max() + 1e-5
        assert error <= budget, f"{name}: {error} > {budget}"


@interpreted
@pytest.mark.triton
def test_half_precision_stays_within_its_budget():
    rows = random_tree(7, 6, 100, backend="triton")
    torch.manual_seed(0)
    q, k, v = (torch.randn(h, len(rows.ends_T), 32, dtype=torch.float16) for h in (2, 1, 1))
    got = attend(tree_attention, (q, k, v), rows, scale=0.2)
    truth = attend(reference, (q.double(), k.double(), v.double()), rows, scale=0.2)
    plain = attend(reference, (q, k, v), rows, scale=0.2)
    for name, a, b, c in zip(("out", "dq", "dk", "dv"), got, truth, plain, strict=True):
        error, budget = (a - b).abs().max(), 2 * (c - b).abs().max() + 2e-3
        assert error <= budget, f"{name}: {error} > {budget}"
