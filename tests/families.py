"""Small random models of common families, and rows that use every hidden state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    DeepseekV3Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
)

from turnfast.model import ATTENTION, Policy
from turnfast.model.architecture import logit_scale, softcap, switch_off_dropout
from turnfast.packing.rows import Rows, rows_of
from turnfast.types import Turn

SMALL = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
LATENT = dict(kv_lora_rank=16, q_lora_rank=None, qk_nope_head_dim=8, qk_rope_head_dim=4)
FAMILIES = {
    "llama": LlamaConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL),
    "qwen2-sliding": Qwen2Config(
        **SMALL, use_sliding_window=True, sliding_window=7, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**SMALL),
    "mistral-sliding": MistralConfig(**SMALL, sliding_window=5),
    "gemma": GemmaConfig(**SMALL),
    # a window in every second layer, and a final soft-cap
    "gemma3": Gemma3TextConfig(
        **SMALL, sliding_window=5, sliding_window_pattern=2, final_logit_softcapping=3.0
    ),
    # scaled logits, by a factor and by a divisor
    "cohere2": Cohere2Config(**SMALL, logit_scale=0.25, sliding_window=5),
    "granite": GraniteConfig(**SMALL, logits_scaling=3.0),
    "olmo2": Olmo2Config(**SMALL),
    # a sliding window that only the attention mask has
    "qwen2_moe": Qwen2MoeConfig(
        **SMALL,
        **EXPERTS,
        shared_expert_intermediate_size=16,
        decoder_sparse_step=1,
        use_sliding_window=True,
        sliding_window=5,
        layer_types=["full_attention", "sliding_attention"],
    ),
    # learned positions and dropout
    "gpt2": GPT2Config(
        vocab_size=97,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        bos_token_id=1,
        eos_token_id=2,
    ),
    # latent attention: values narrower than keys
    "deepseek_v3": DeepseekV3Config(
        **{**SMALL, "head_dim": 4, "num_key_value_heads": 4},
        **LATENT,
        v_head_dim=6,
        first_k_dense_replace=2,
    ),
}


def policy_of(config: PretrainedConfig, device: str = "cpu") -> Policy:
    """Build a model with fixed random weights and no tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION)
    switch_off_dropout(model)
    return Policy(
        model=model.to(device),
        tokenizer=None,  # type: ignore[arg-type]
        folder=Path(),
        device=torch.device(device),
        attention="sdpa",
        softcap=softcap(config),
        logit_scale=logit_scale(config),
    )


def whole_rows(rows: Sequence[list[int]]) -> Rows:
    """Rows in which every token predicts the next one, so every hidden state is used."""
    turns = [
        Turn(
            prompt_ids=(row[0],),
            sampled_ids=(*row[1:], 1),
            logprobs=(0.0,) * len(row),
            text="",
            finish="stop",
        )
        for row in rows
    ]
    return rows_of([[turn] for turn in turns], [1.0] * len(turns))
