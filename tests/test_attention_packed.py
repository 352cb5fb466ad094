"""Packed attention against torch's attention over each row, forward and backward."""

from __future__ import annotations

import importlib.util
from itertools import pairwise

import pytest
import torch
from attention_cases import output_and_gradients, random_qkv
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from turnfast.kernels.attention import PackedRows, packed_attention, pick_backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LENGTHS = (1, 23, 2, 130, 23, 9, 400)


def rows_of(lengths, backend, device=CPU) -> PackedRows:
    edges = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    return PackedRows(
        cu_seqlens=edges, lengths=tuple(lengths), backend=backend, max_seqlen=max(lengths)
    )


def per_row(q, k, v, rows, *, scale, window=0):
    """Reference: torch's attention over one row at a time, in float64."""
    outputs = []
    for begin, end in pairwise(rows.cu_seqlens.tolist()):
        distance = torch.arange(end - begin, device=q.device)
        distance = distance[:, None] - distance[None, :]
        seen = (distance >= 0) & (distance < (window or end))
        cut = [x[None, :, begin:end].double() for x in (q, k, v)]
        out = F.scaled_dot_product_attention(*cut, attn_mask=seen, scale=scale, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def assert_equals_reference(qkv, rows: PackedRows, *, scale=0.2, window=0, bound=1e-5) -> None:
    options = {"scale": scale, "window": window}
    found = output_and_gradients(packed_attention, qkv, rows, **options)
    exact = output_and_gradients(per_row, qkv, rows, **options)
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, exact, strict=True):
        error, size = float((a - b).abs().max()), float(b.abs().max())
        assert error <= bound * (1 + size), f"{name}: {error} of {size}"


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=9),
    heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    window=st.sampled_from([0, 1, 7, 64]),
    value_width=st.sampled_from([0, 12]),
)
def test_sdpa_equals_the_reference(lengths, heads, window, value_width):
    rows = rows_of(lengths, "sdpa")
    qkv = random_qkv(sum(lengths), heads, 20, value_width=value_width)
    assert_equals_reference(qkv, rows, scale=20**-0.5, window=window)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["flash", "varlen"])
@pytest.mark.parametrize("window", [0, 1, 64, 300])
@pytest.mark.parametrize(("heads", "width"), [((4, 4), 64), ((6, 2), 128), ((7, 1), 96)])
def test_cuda_backend_equals_the_reference(backend, window, heads, width):
    try:
        pick_backend(CUDA, backend, head_dim=width, window=window)
    except ValueError as error:
        pytest.skip(str(error))
    rows = rows_of(LENGTHS, backend, CUDA)
    qkv = random_qkv(sum(LENGTHS), heads, width, device="cuda", dtype=torch.bfloat16)
    assert_equals_reference(qkv, rows, window=window, bound=2e-2)


def varlen_2_10(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None
):
    assert is_causal and torch.equal(cu_seq_q, cu_seq_k) and max_q == max_k
    return varlen_reference(query, key, value, cu_seq_q, query.shape[-1] ** -0.5, 0)


def varlen_2_13(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)
):
    assert torch.equal(cu_seq_q, cu_seq_k) and max_q == max_k and window_size[1] == 0
    return varlen_reference(query, key, value, cu_seq_q, scale, window_size[0] + 1)


def varlen_reference(q, k, v, edges, scale, window):
    """varlen_attn on the CPU; like torch 2.10 it has no grouped heads."""
    assert q.shape == k.shape == v.shape
    rows = rows_of(edges.diff().tolist(), "varlen")
    return per_row(*(x.transpose(0, 1) for x in (q, k, v)), rows, scale=scale, window=window)


@pytest.mark.parametrize(
    ("operator", "window"),
    [(varlen_2_10, 0), (varlen_2_13, 0), (varlen_2_13, 7)],
)
def test_varlen_arguments_fit_the_torch_version(operator, window, monkeypatch):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", operator)
    rows = rows_of((5, 30, 1), "varlen")
    assert_equals_reference(random_qkv(36, (6, 2), 16), rows, scale=0.7, window=window)


def test_window_needs_a_torch_whose_varlen_has_one(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_2_13)
    assert pick_backend(CUDA, window=7) == "varlen"
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_2_10)
    assert pick_backend(CUDA) == "varlen"
    assert pick_backend(CUDA, window=7) == "sdpa"
    with pytest.raises(ValueError, match=r"'varlen' needs a newer torch for a sliding window"):
        pick_backend(CUDA, "varlen", window=7)


def test_values_narrower_than_keys_need_sdpa(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert pick_backend(CUDA, head_dim=64) == "flash"
    assert pick_backend(CUDA, head_dim=192, value_dim=128) == "sdpa"
    for backend in ("flash", "varlen"):
        with pytest.raises(ValueError, match=r"the model's have 128 and 192 dimensions; 'sdpa'"):
            pick_backend(CUDA, backend, head_dim=192, value_dim=128)


@pytest.mark.parametrize(
    ("shapes", "backend", "message"),
    [
        (((4, 9, 8), (2, 9, 8), (2, 9, 8)), "sdpa", r"expected 5 tokens.*q \[4, 9, 8\]"),
        (((4, 5, 8), (2, 5, 8), (2, 4, 8)), "sdpa", r"expected 5 tokens.*v \[2, 4, 8\]"),
        (((4, 5, 8), (3, 5, 8), (3, 5, 8)), "sdpa", r"a multiple of key and value heads"),
        (((4, 5, 8), (2, 5, 6), (2, 5, 8)), "sdpa", r"keys as wide as queries"),
        (((4, 5, 8), (2, 5, 8), (2, 5, 6)), "varlen", r"'varlen' needs values as wide as keys"),
    ],
)
def test_shapes_that_do_not_match_are_errors(shapes, backend, message):
    with pytest.raises(ValueError, match=message):
        packed_attention(*map(torch.zeros, shapes), rows_of((2, 3), backend), scale=1.0)
