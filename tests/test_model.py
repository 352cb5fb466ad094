"""Packed rows give the logits of one row at a time, for the families people train."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from turnfast.config import ConfigError, ModelConfig
from turnfast.model import ATTENTION, Policy, hidden_states, load_policy

SMALL = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
)
FAMILIES = {
    "llama": LlamaConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL),
    "qwen2-sliding": Qwen2Config(
        **SMALL, use_sliding_window=True, sliding_window=7, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**SMALL),
    "mistral-sliding": MistralConfig(**SMALL, sliding_window=5),
    "gemma": GemmaConfig(**SMALL),
}
LENGTHS = (1, 23, 2, 23, 9, 40)


def policy_of(config) -> Policy:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION)
    return Policy(
        model=model, tokenizer=None, folder=None, device=torch.device("cpu"), attention="sdpa"
    )


def pack_of(lengths, vocab_size):
    torch.manual_seed(1)
    edges = torch.tensor([0, *lengths]).cumsum(0).int()
    return SimpleNamespace(
        tokens_T=torch.randint(vocab_size, (sum(lengths),)),
        positions_T=torch.cat([torch.arange(n) for n in lengths]),
        cu_seqlens=edges,
        max_seqlen=max(lengths),
        ends_T=None,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_unpacked(family):
    policy, batch = policy_of(FAMILIES[family]), pack_of(LENGTHS, 97)
    packed = policy.model.lm_head(hidden_states(policy, batch))
    policy.model.config._attn_implementation = "eager"
    for row, (begin, end) in enumerate(zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False)):
        alone = policy.model(batch.tokens_T[None, begin:end]).logits[0]
        assert (packed[begin:end] - alone).abs().max() < 1e-4, f"row {row}"


def test_rows_do_not_see_each_other():
    policy, batch = policy_of(FAMILIES["qwen3"]), pack_of(LENGTHS, 97)
    before = hidden_states(policy, batch)
    changed = batch.tokens_T.clone()
    changed[1:24] = (changed[1:24] + 1) % 97
    after = hidden_states(policy, SimpleNamespace(**{**vars(batch), "tokens_T": changed}))
    same = (before == after).all(1)
    assert same[:1].all() and same[24:].all() and not same[1:24].any()


def test_checkpointing_gives_the_same_gradient():
    policy, batch = policy_of(FAMILIES["qwen3"]), pack_of(LENGTHS, 97)

    def gradient():
        policy.model.zero_grad()
        hidden_states(policy, batch).square().sum().backward()
        return [p.grad.clone() for p in policy.model.model.parameters()]

    plain = gradient()
    policy.model.train()
    policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    for a, b in zip(plain, gradient(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.path"):
        load_policy(ModelConfig(), tmp_path, torch.device("cpu"))


def test_an_attention_backend_that_cannot_run_is_refused(tiny_folder):
    with pytest.raises(ConfigError, match=r"model\.attention.*CUDA"):
        load_policy(ModelConfig(attention="varlen"), tiny_folder, torch.device("cpu"))
