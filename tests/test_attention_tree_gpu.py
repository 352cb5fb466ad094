"""Compiled tree attention, and the gradients of a model that uses it, on a CUDA device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import (
    assert_matches_reference,
    output_and_gradients,
    random_qkv,
    random_rows,
    tree_rows,
)
from families import SMALL, policy_of, whole_rows
from transformers import Qwen3Config
from turnfast.kernels.attention import pick_tree_backend, tree_attention

from turnfast.model import hidden_states
from turnfast.packing.pack import batch_of

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "width", "window"),
    [((4, 2), 64, 0), ((7, 1), 128, 0), ((2, 2), 128, 300), ((2, 1), 80, 7), ((2, 2), 256, 0)],
)
def test_matches_the_reference_and_repeats(dtype, heads, width, window):
    if pick_tree_backend(torch.device("cuda"), head_dim=width, dtype=dtype) != "triton":
        pytest.skip("SDPA is the backend here")
    rows = tree_rows(random_rows(1, 12, 700), "cuda", backend="triton")
    qkv = random_qkv(len(rows.ends_T), heads, width, device="cuda", dtype=dtype)
    options = {"scale": width**-0.5, "window": window}
    floor = 1e-5 if dtype == torch.float32 else 1e-2
    first = assert_matches_reference(qkv, rows, **options, floor=floor)
    again = output_and_gradients(tree_attention, qkv, rows, **options)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_model_has_the_same_gradients_over_a_tree_and_over_rows():
    config = Qwen3Config(**{**SMALL, "head_dim": 16, "max_position_embeddings": 512})
    policy = replace(policy_of(config, "cuda"), tree_attention="triton")
    model = policy.model
    rows = whole_rows(random_rows(3, 12, 300))

    def gradients(share_prefixes: bool) -> list[torch.Tensor]:
        batch = batch_of(rows, [1.0] * len(rows), policy.device, share_prefixes=share_prefixes)
        model.zero_grad()
        hidden = hidden_states(policy, batch)[batch.rows_N]
        model.lm_head(hidden).log_softmax(-1).square().mean().backward()
        return [p.grad.clone() for p in model.parameters()]

    for a, b in zip(gradients(True), gradients(False), strict=True):
        assert (a - b).abs().max() < 1e-5
