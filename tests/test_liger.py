"""The model that Liger's kernels are put into stays the same model.

In the interpreter its rotary embedding, the only one that the interpreter can run; all on a GPU.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, Qwen2Config, Qwen3Config

from turnfast.liger import apply_liger
from turnfast.model import ATTENTION, Policy, hidden_states
from turnfast.packing import Row, batch_of

pytest.importorskip("liger_kernel")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

SMALL = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)
FAMILIES = {
    "llama": LlamaConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL),
    "gemma": GemmaConfig(**SMALL),
}


def whole_row(ids: list[int]) -> Row:
    every = list(range(len(ids)))
    return Row(
        tokens=ids,
        rows=every,
        targets=[1] * len(ids),
        turns=[0] * len(ids),
        logprobs=[0.0] * len(ids),
        advantages=[1.0],
        trajectory=0,
    )


@pytest.fixture(autouse=True)
def rotary_of_transformers(monkeypatch):
    """Liger replaces it for the whole process; every test has it back."""
    for name in FAMILIES:
        module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        monkeypatch.setattr(module, "apply_rotary_pos_emb", module.apply_rotary_pos_emb)


@pytest.mark.triton
@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_gradients_stay(family, monkeypatch):
    monkeypatch.setattr("turnfast.liger.PARTS", {"rope"})
    compare(family, torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_gradients_stay_on_a_gpu(family):
    compare(family, torch.device("cuda"))


def compare(family: str, device: torch.device) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family], attn_implementation=ATTENTION)
    policy = Policy(
        model=model.to(device),
        tokenizer=None,  # type: ignore[arg-type]
        folder=Path(),
        device=device,
        attention="sdpa",
    )
    prompt = torch.randint(97, (6,)).tolist()
    rows = [prompt + torch.randint(97, (n,)).tolist() for n in (3, 9, 5)]
    batch = batch_of([whole_row(ids) for ids in rows], [1.0], device, share_prefixes=True)

    def run() -> list[torch.Tensor]:
        model.zero_grad()
        hidden = hidden_states(policy, batch)
        hidden.sin().mean().backward()
        return [hidden.detach(), *(p.grad for p in model.base_model.parameters())]

    plain = run()
    assert apply_liger(model, True, device)
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    assert "liger" in module.apply_rotary_pos_emb.__module__
    for a, b in zip(plain, run(), strict=True):
        assert (a - b).abs().max() < 1e-4
