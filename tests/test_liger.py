"""The model that Liger's kernels are put into stays the same model.

In the interpreter its rotary embedding, the only one that the interpreter can run; all on a GPU.
"""

from __future__ import annotations

import importlib
import os

import pytest
import torch
from families import FAMILIES, policy_of, whole_row

from turnfast.liger import apply_liger
from turnfast.model import hidden_states
from turnfast.packing import batch_of

pytest.importorskip("liger_kernel")
NAMES = ("llama", "qwen2", "qwen3", "gemma")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(autouse=True)
def rotary_of_transformers(monkeypatch):
    """Liger replaces it for the whole process; every test has it back."""
    for name in NAMES:
        module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        monkeypatch.setattr(module, "apply_rotary_pos_emb", module.apply_rotary_pos_emb)


@pytest.mark.triton
@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("family", NAMES)
def test_hidden_states_and_gradients_stay(family, monkeypatch):
    monkeypatch.setattr("turnfast.liger.PARTS", {"rope"})
    compare(family, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("family", NAMES)
def test_hidden_states_and_gradients_stay_on_a_gpu(family):
    compare(family, "cuda")


def compare(family: str, device: str) -> None:
    policy = policy_of(FAMILIES[family], device)
    model = policy.model
    prompt = torch.randint(97, (6,)).tolist()
    rows = [prompt + torch.randint(97, (n,)).tolist() for n in (3, 9, 5)]
    batch = batch_of([whole_row(ids) for ids in rows], [1.0], device, share_prefixes=True)

    def run() -> list[torch.Tensor]:
        model.zero_grad()
        hidden = hidden_states(policy, batch)
        hidden.sin().mean().backward()
        return [hidden.detach(), *(p.grad for p in model.base_model.parameters())]

    plain = run()
    assert apply_liger(model, True, policy.device)
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    assert "liger" in module.apply_rotary_pos_emb.__module__
    for a, b in zip(plain, run(), strict=True):
        assert (a - b).abs().max() < 1e-4
