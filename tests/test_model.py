"""Packed rows give the logits of single rows, for each model family; errors at load time."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, SMALL, policy_of, whole_rows
from transformers import LlamaConfig, MambaConfig, MambaForCausalLM
from turnfast.kernels import linear_logprobs

from turnfast.config.schema import ModelConfig
from turnfast.errors import ConfigError
from turnfast.model import (
    attention_backends,
    check_context_length,
    hidden_states,
    load_policy,
)
from turnfast.packing.pack import batch_of

LENGTHS = (1, 23, 2, 23, 9, 40)


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
    """Compare logits and the log-probs of the loss head with one row at a time."""
    policy, batch = policy_of(FAMILIES[family]), pack_of(LENGTHS, 97)
    policy.model.train()
    index = torch.arange(len(batch.tokens_T))
    targets = torch.randint(97, index.shape)
    hidden = hidden_states(policy, batch)
    found = linear_logprobs(hidden, policy.head_VD, index, targets, softcap=policy.softcap)
    packed = hidden @ policy.head_VD.T
    if policy.softcap:
        packed = policy.softcap * torch.tanh(packed / policy.softcap)
    policy.model.eval().config._attn_implementation = "eager"
    for row, (begin, end) in enumerate(zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False)):
        alone = policy.model(batch.tokens_T[None, begin:end]).logits[0]
        logprobs = alone.log_softmax(-1).gather(1, targets[begin:end, None]).squeeze(1)
        assert (packed[begin:end] - alone).abs().max() < 1e-4, f"row {row}"
        assert (found.logprobs[begin:end] - logprobs).abs().max() < 1e-5, f"row {row}"


def test_rows_do_not_see_each_other():
    policy, batch = policy_of(FAMILIES["qwen3"]), pack_of(LENGTHS, 97)
    before = hidden_states(policy, batch)
    changed = batch.tokens_T.clone()
    changed[1:24] = (changed[1:24] + 1) % 97
    after = hidden_states(policy, SimpleNamespace(**{**vars(batch), "tokens_T": changed}))
    same = (before == after).all(1)
    assert same[:1].all() and same[24:].all() and not same[1:24].any()


def test_gradient_checkpointing_keeps_the_gradient():
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


def test_folder_without_a_model_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.path"):
        load_policy(ModelConfig(), tmp_path, torch.device("cpu"))


def test_damaged_weights_file_is_an_error(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ConfigError, match=r"model\.path: .*model cannot be loaded as a model"):
        load_policy(ModelConfig(), tmp_path / "model", torch.device("cpu"))


def test_positions_beyond_the_model_are_an_error():
    architecture = LlamaConfig(**SMALL)
    check_context_length(architecture, 128)
    with pytest.raises(ConfigError, match=r"rollout\.max_context: 129 tokens.* = 128"):
        check_context_length(architecture, 129)


def test_attention_backend_that_cannot_run_is_an_error(tiny_folder):
    with pytest.raises(ConfigError, match=r"model\.attention.*CUDA"):
        load_policy(ModelConfig(attention="varlen"), tiny_folder, torch.device("cpu"))


CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("attention", "changed", "message"),
    [
        ("varlen", {"head_dim": 512}, r"'varlen' needs heads of at most 256 .* have 512; 'sdpa'"),
        ("auto", {"attn_logit_softcapping": 50.0}, r"caps its attention logits"),
        ("auto", {"layer_types": ["full_attention", "linear_attention"]}, r"linear_attention"),
    ],
)
def test_unsupported_attention_is_an_error(attention, changed, message):
    architecture = LlamaConfig(**SMALL)
    for name, value in changed.items():
        setattr(architecture, name, value)
    with pytest.raises(ConfigError, match=message):
        attention_backends(ModelConfig(attention=attention), architecture, CUDA)


def test_backends_of_wide_heads_and_of_float32_on_cuda(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "triton" or None)
    wide = LlamaConfig(**{**SMALL, "head_dim": 512})
    plain = LlamaConfig(**SMALL)
    assert attention_backends(ModelConfig(), plain, CUDA) == ("varlen", "triton")
    assert attention_backends(ModelConfig(), wide, CUDA) == ("sdpa", "sdpa")
    assert attention_backends(ModelConfig(dtype="float32"), plain, CUDA) == ("sdpa", "triton")
    with pytest.raises(ConfigError, match=r"model\.attention.*the model is float32"):
        attention_backends(ModelConfig(dtype="float32", attention="varlen"), plain, CUDA)


def test_model_without_attention_is_an_error(tmp_path):
    config = MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.path: mamba has layers of type linear"):
        load_policy(ModelConfig(), tmp_path, torch.device("cpu"))


def test_liger_that_cannot_run_is_an_error(tiny_folder, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cpu = torch.device("cpu")
    with pytest.raises(ConfigError, match=r"model\.liger: .*(CUDA|not installed)"):
        load_policy(ModelConfig(liger=True), tiny_folder, cpu)
    policy = load_policy(ModelConfig(liger="auto"), tiny_folder, cpu)
    assert "Liger" not in repr(policy.model)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_model_equals_the_eager_model(tiny_folder):
    """Hidden states and gradients, for rows and trees of several lengths."""
    eager = load_policy(ModelConfig(), tiny_folder, torch.device("cpu"))
    compiled = load_policy(ModelConfig(compile=True), tiny_folder, torch.device("cpu"))
    assert eager.body is None and compiled.body is not None
    torch.manual_seed(0)
    for lengths, shared in (((5, 20, 9), 0), ((30, 31), 4), ((7, 7, 40), 6)):
        tokens = [torch.randint(3, 90, (n,)).tolist() for n in lengths]
        rows = whole_rows([[1] * shared + ids for ids in tokens])
        batch = batch_of(rows, [1.0] * len(rows), "cpu", share_prefixes=bool(shared))
        gradients = []
        for policy in (eager, compiled):
            policy.model.zero_grad()
            hidden = hidden_states(policy, batch)
            hidden.square().mean().backward()
            gradients.append([hidden.detach(), *(p.grad for p in policy.model.model.parameters())])
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
