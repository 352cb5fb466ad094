"""Block lists against all pairs of blocks, and the Triton kernels in the interpreter."""

from __future__ import annotations

import os

import pytest
import torch
from attention_cases import assert_matches_reference, random_qkv, random_rows, tree_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from turnfast.kernels.attention.block_lists import Blocks, block_lists
from turnfast.kernels.attention.tiles import visible

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
)


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
def test_lists_contain_the_visible_blocks(seed, shape, blocks, window):
    rows = tree_rows(random_rows(seed, *shape, vocab=9))
    length = len(rows.ends_T)
    index = torch.arange(length)
    seen = visible(rows.ends_T, rows.positions_T, index, index, window)
    lists = block_lists(rows.ends_T, rows.positions_T, *blocks, window)
    spans = [range(0, length, size) for size in blocks]
    pairs = [[seen[q : q + blocks[0], k : k + blocks[1]] for k in spans[1]] for q in spans[0]]
    some, every = (
        torch.tensor([[reduce(pair) for pair in row] for row in pairs])
        for reduce in (torch.any, torch.all)
    )
    whole = matrix(lists.whole_keys, len(spans[1]))
    mixed = matrix(lists.mixed_keys, len(spans[1]))
    assert torch.equal(whole, matrix(lists.whole_queries, len(spans[0])).T)
    assert torch.equal(mixed, matrix(lists.mixed_queries, len(spans[0])).T)
    assert not (whole & mixed).any() and not (whole & ~every).any()
    if window:  # the lists use only the extreme depths of a block
        assert not (some & ~whole & ~mixed).any()
    else:
        assert torch.equal(whole | mixed, some)


@interpreted
@pytest.mark.triton
@pytest.mark.parametrize(
    ("seed", "shape", "heads", "width", "window", "dtype"),
    [
        (0, (1, 1), (1, 1), 16, 0, torch.float32),
        (1, (6, 60), (2, 1), 32, 0, torch.float32),
        (2, (5, 90), (2, 2), 20, 9, torch.float32),
        (3, (5, 100), (2, 1), 64, 0, torch.float32),
        (4, (3, 150), (2, 1), 128, 40, torch.float32),
        (5, (9, 40), (3, 1), 80, 1, torch.float32),
        (7, (6, 100), (2, 1), 32, 0, torch.float16),
    ],
)
def test_matches_the_reference(seed, shape, heads, width, window, dtype):
    rows = tree_rows(random_rows(seed, *shape, vocab=9), backend="triton")
    qkv = random_qkv(len(rows.ends_T), heads, width, seed=seed, dtype=dtype)
    floor = 2e-3 if dtype == torch.float16 else 1e-5
    assert_matches_reference(qkv, rows, scale=width**-0.5, window=window, floor=floor)
