"""Hidden states and gradients with Liger's kernels, in the interpreter and on a GPU."""

from __future__ import annotations

import importlib
import os

import numpy as np
import pytest
import torch
from families import FAMILIES, policy_of, whole_rows

from turnfast.model import hidden_states
from turnfast.model.liger import apply_liger
from turnfast.packing.pack import batch_of

pytest.importorskip("liger_kernel")
triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
CONFIGS = {name: FAMILIES[name] for name in ("llama", "qwen2", "qwen3", "gemma")}
CONFIGS["mistral"] = FAMILIES["mistral-sliding"]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(autouse=True)
def restore_transformers(monkeypatch):
    """Liger replaces classes and functions of transformers: restore them after each test."""
    for name in CONFIGS:
        module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        for attribute, value in vars(module).items():
            if callable(value):
                monkeypatch.setattr(module, attribute, value)


@triton.jit
def rsqrt(x):
    return tl.rsqrt(x)


@triton.jit
def tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@pytest.fixture
def interpreter(monkeypatch):
    """Add to the interpreter what Liger's kernels need: float32 scalars for float arguments, and
    two functions of libdevice, which is machine code."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    convert = interpreter._implicit_cvt

    def with_floats(x):
        if not isinstance(x, float):
            return convert(x)
        handle = interpreter.TensorHandle(np.array([x], np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    monkeypatch.setattr(interpreter, "_implicit_cvt", with_floats)
    monkeypatch.setattr("liger_kernel.ops.rms_norm.rsqrt", rsqrt)
    monkeypatch.setattr("liger_kernel.ops.geglu.tanh", tanh)


@pytest.mark.triton
@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("family", CONFIGS)
def test_same_hidden_states_and_gradients(family, interpreter):
    assert_same_model(family, "cpu", bound=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("family", CONFIGS)
def test_same_hidden_states_and_gradients_on_a_gpu(family):
    assert_same_model(family, "cuda", bound=1e-4)


def assert_same_model(family: str, device: str, *, bound: float) -> None:
    policy = policy_of(CONFIGS[family], device)
    model = policy.model
    prompt = torch.randint(97, (6,)).tolist()
    rows = [prompt + torch.randint(97, (n,)).tolist() for n in (3, 9, 5)]
    batch = batch_of(whole_rows(rows), [1.0] * len(rows), device, share_prefixes=True)

    def run() -> dict[str, torch.Tensor]:
        model.zero_grad()
        hidden = hidden_states(policy, batch)
        hidden.sin().sum().backward()
        grads = {name: p.grad for name, p in model.base_model.named_parameters()}
        return {"hidden": hidden.detach(), **grads}

    plain = run()
    assert apply_liger(model, True, policy.device)
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    layer = model.base_model.layers[0]
    parts = [module.apply_rotary_pos_emb, layer.mlp.forward, layer.input_layernorm.forward]
    parts += [layer.post_attention_layernorm.forward, model.base_model.norm.forward]
    assert all("liger" in part.__module__ for part in parts)
    for name, found in run().items():
        size = plain[name].abs().max()
        assert size > 0 and (plain[name] - found).abs().max() < bound * size, name
