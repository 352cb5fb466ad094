"""Tree attention against its reference, and its tiles."""

from __future__ import annotations

import pytest
import torch
from attention_cases import assert_matches_reference, random_qkv, random_rows, tree_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from turnfast.kernels.attention import TreeRows, pick_tree_backend, tree_attention


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    size=st.sampled_from([(1, 5), (9, 60), (20, 60), (6, 300)]),
    heads=st.sampled_from([(4, 4), (4, 2), (6, 1), (1, 1)]),
    width=st.sampled_from([8, 20, 32]),
    window=st.sampled_from([0, 1, 7, 64]),
)
def test_matches_the_reference(seed, size, heads, width, window):
    rows = tree_rows(random_rows(seed, *size))
    qkv = random_qkv(len(rows.ends_T), heads, width, seed=seed)
    assert_matches_reference(qkv, rows, scale=width**-0.5, window=window)


def long_rows() -> TreeRows:
    shared, fresh = [1] * 40, [2] * 2060
    branch = shared + fresh[:900] + [4] * 30
    return tree_rows([shared + fresh, shared + [3] * 2060, branch, [5] * 9])


@pytest.mark.parametrize("window", [0, 2080])
def test_long_rows_match_the_reference(window):
    rows = long_rows()
    qkv = random_qkv(len(rows.ends_T), (1, 1), 8)
    assert_matches_reference(qkv, rows, scale=8**-0.5, window=window)


@pytest.mark.parametrize(("window", "causal"), [(0, 2), (7, 0), (2080, 0), (2100, 2)])
def test_tiles_cover_each_token_once_and_have_few_keys(window, causal):
    rows = long_rows()
    tiles = list(rows.tiles(window))
    assert [tile.first for tile in tiles] == [0, *(tile.stop for tile in tiles[:-1])]
    assert tiles[-1].stop == len(rows.ends_T)
    # a long stretch is one tile if the window covers it and its path
    whole = [(tile.stop - tile.first, len(tile.queries)) for tile in tiles if tile.causal]
    assert whole == [(2100, 2100), (2060, 2100)][:causal]
    for tile in tiles:
        # a tile has up to three branches, each with its own window of keys
        assert len(tile.keys) - len(tile.own) <= 3 * (window or 2100)
        assert tile.causal or len(tile.queries) == len(tile.own) <= 256


def test_masks_are_cached_for_all_layers():
    rows = tree_rows([[1] * 3 + [2] * 200, [1] * 3 + [3] * 200])
    tiles = rows.tiles(0)
    first, *_ = tiles
    assert tiles.mask(first, torch.float32) is tiles.mask(first, torch.float32)
    assert tiles.mask(first, torch.bfloat16).dtype == torch.bfloat16


def test_tokens_see_only_ancestors():
    rows = tree_rows([[1, 2, 3, 4], [1, 2, 9, 9, 9], [7, 7]])
    q, k, v = random_qkv(9, (2, 2), 8)
    before = tree_attention(q, k, v, rows, scale=1.0)
    k[:, 4] += 1.0  # the first 9 of the second row
    after = tree_attention(q, k, v, rows, scale=1.0)
    changed = (before != after).any(dim=2).any(dim=1)
    assert changed.tolist() == [False] * 4 + [True] * 3 + [False] * 2


def test_no_tensor_has_the_size_of_all_scores():
    length, rows = 6000, tree_rows([[1] * 5000, [1] * 4000 + [2] * 1000])
    q, k, v = random_qkv(length, (1, 1), 8)
    largest = 0

    class LargestTensor(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple) else (out,):
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.numel())
            return out

    with LargestTensor():
        tree_attention(q, k, v, rows, scale=1.0)
    assert largest < length * length / 20


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 9, 8), (2, 9, 8), (2, 9, 8)), r"expected 5 tokens.*q \[2, 9, 8\]"),
        (((2, 3, 8), (2, 3, 8), (2, 3, 8)), r"expected 5 tokens.*q \[2, 3, 8\]"),
        (((2, 5, 8), (2, 5, 8), (2, 7, 8)), r"expected 5 tokens.*v \[2, 7, 8\]"),
        (((3, 5, 8), (2, 5, 8), (2, 5, 8)), r"a multiple of key and value heads"),
    ],
)
def test_shapes_that_do_not_match_the_tree_are_errors(backend, shapes, message):
    rows = tree_rows([[1, 2, 3, 4], [1, 2, 9]], backend=backend)
    with pytest.raises(ValueError, match=message):
        tree_attention(*map(torch.zeros, shapes), rows, scale=1.0)


def test_wrong_positions_or_values_are_errors():
    rows = tree_rows([[1, 2, 3, 4], [1, 2, 9]])
    q = torch.zeros(2, 5, 8)
    cut = TreeRows(ends_T=rows.ends_T, positions_T=rows.positions_T[:3])
    with pytest.raises(ValueError, match="positions_T: expected 5 entries like ends_T, got 3"):
        tree_attention(q, q, q, cut, scale=1.0)
    on_triton = TreeRows(ends_T=rows.ends_T, positions_T=rows.positions_T, backend="triton")
    with pytest.raises(ValueError, match=r"'triton' needs values as wide as keys.*v \[2, 5, 6\]"):
        tree_attention(q, q, q[..., :6], on_triton, scale=1.0)
    assert tree_attention(q, q, q[..., :6], rows, scale=1.0).shape == (5, 2, 6)


def test_backend_that_cannot_run_is_an_error(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert pick_tree_backend(cpu) == "sdpa"
    assert pick_tree_backend(cuda, head_dim=512) == "sdpa"
    with pytest.raises(ValueError, match=r"'triton'.*CUDA device.*'sdpa' works here"):
        pick_tree_backend(cpu, "triton")
    with pytest.raises(ValueError, match=r"at most 256 dimensions, the model's have 512"):
        pick_tree_backend(cuda, "triton", head_dim=512)
    with pytest.raises(ValueError, match=r"float32 heads have at most 64 .* have 128; 'sdpa'"):
        pick_tree_backend(cuda, "triton", head_dim=128, dtype=torch.float32)
    assert pick_tree_backend(cuda, head_dim=128, dtype=torch.float32) == "sdpa"
    assert pick_tree_backend(cuda, head_dim=64, dtype=torch.float32) == "triton"
    with pytest.raises(ValueError, match=r"values as wide as keys, the model's have 128 and 192"):
        pick_tree_backend(cuda, "triton", head_dim=192, value_dim=128)
    assert pick_tree_backend(cuda, head_dim=192, value_dim=128) == "sdpa"
    with pytest.raises(ValueError, match="none of"):
        pick_tree_backend(cpu, "flash")
