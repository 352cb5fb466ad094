"""Batches give the logits and gradients of single rows, in each model family; load errors."""

from __future__ import annotations

import shutil

import pytest
import torch
from attention_cases import random_rows
from families import FAMILIES, SMALL, policy_of, whole_rows
from transformers import LlamaConfig
from turnfast.kernels import linear_logprobs

from turnfast.config.schema import ModelConfig
from turnfast.errors import ConfigError
from turnfast.model import (
    Policy,
    attention_backends,
    check_context_length,
    hidden_states,
    load_policy,
)
from turnfast.packing.pack import batch_of
from turnfast.types import Batch

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def random_batch(*, share_prefixes: bool) -> tuple[list[list[int]], Batch]:
    """Rows with common beginnings, and their batch."""
    rows = random_rows(3, 12, 60)
    batch = batch_of(whole_rows(rows), [1.0] * len(rows), "cpu", share_prefixes=share_prefixes)
    assert (len(batch.tokens_T) < sum(map(len, rows))) == share_prefixes
    return rows, batch


def gradients(policy: Policy, loss: torch.Tensor) -> list[torch.Tensor]:
    policy.model.zero_grad()
    loss.backward()
    return [p.grad for p in policy.model.parameters()]


@pytest.mark.parametrize("share_prefixes", [False, True], ids=["rows", "tree"])
@pytest.mark.parametrize("family", FAMILIES)
def test_batch_equals_single_rows(family, share_prefixes):
    """Logits, log-probs of the loss head, and gradients."""
    policy = policy_of(FAMILIES[family])
    rows, batch = random_batch(share_prefixes=share_prefixes)
    hidden_TD = hidden_states(policy, batch)
    logits = hidden_TD[batch.rows_N] @ policy.head_VD.T
    if policy.softcap:
        logits = policy.softcap * torch.tanh(logits / policy.softcap)
    head = linear_logprobs(
        hidden_TD, policy.head_VD, batch.rows_N, batch.targets_N, softcap=policy.softcap
    )
    policy.model.config._attn_implementation = "eager"
    alone = torch.cat([policy.model(torch.tensor([row])).logits[0] for row in rows])
    logprobs = alone.log_softmax(-1).gather(1, batch.targets_N[:, None]).squeeze(1)
    assert (logits - alone).abs().max() < 1e-5
    assert (head.logprobs - logprobs).abs().max() < 1e-5
    found, expected = (
        gradients(policy, x.log_softmax(-1).square().mean(1).mean()) for x in (logits, alone)
    )
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() < 1e-5


def test_gradient_checkpointing_keeps_the_gradient():
    policy = policy_of(FAMILIES["qwen3"])
    _, batch = random_batch(share_prefixes=False)
    plain = gradients(policy, hidden_states(policy, batch).square().mean())
    policy.model.train()
    policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    again = gradients(policy, hidden_states(policy, batch).square().mean())
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_folder_without_a_model_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.path"):
        load_policy(ModelConfig(), tmp_path, CPU)


def test_damaged_weights_file_is_an_error(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ConfigError, match=r"model\.path: .*model cannot be loaded as a model"):
        load_policy(ModelConfig(), tmp_path / "model", CPU)


def test_positions_beyond_the_model_are_an_error():
    architecture = LlamaConfig(**SMALL)
    check_context_length(architecture, 128)
    with pytest.raises(ConfigError, match=r"rollout\.max_context: 129 tokens.* = 128"):
        check_context_length(architecture, 129)


def test_attention_backend_that_cannot_run_is_an_error(tiny_folder):
    with pytest.raises(ConfigError, match=r"model\.attention.*CUDA"):
        load_policy(ModelConfig(attention="varlen"), tiny_folder, CPU)


def test_attention_backends_on_cuda(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "triton" or None)
    plain, wide = (LlamaConfig(**{**SMALL, "head_dim": width}) for width in (8, 512))
    assert attention_backends(ModelConfig(), plain, CUDA) == ("varlen", "triton")
    assert attention_backends(ModelConfig(), wide, CUDA) == ("sdpa", "sdpa")
    assert attention_backends(ModelConfig(dtype="float32"), plain, CUDA) == ("sdpa", "triton")
    with pytest.raises(ConfigError, match=r"model\.attention.*the model is float32"):
        attention_backends(ModelConfig(dtype="float32", attention="varlen"), plain, CUDA)
    with pytest.raises(ConfigError, match=r"'varlen' needs heads of at most 256 .* 512; 'sdpa'"):
        attention_backends(ModelConfig(attention="varlen"), wide, CUDA)


def test_liger_that_cannot_run_is_an_error(tiny_folder, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match=r"model\.liger: .*(CUDA|not installed)"):
        load_policy(ModelConfig(liger=True), tiny_folder, CPU)
    policy = load_policy(ModelConfig(liger="auto"), tiny_folder, CPU)
    assert "Liger" not in repr(policy.model)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_model_equals_the_eager_model(tiny_folder):
    """Hidden states and gradients, for rows and trees of several lengths."""
    eager = load_policy(ModelConfig(), tiny_folder, CPU)
    compiled = load_policy(ModelConfig(compile=True), tiny_folder, CPU)
    assert eager.body is None and compiled.body is not None
    torch.manual_seed(0)
    for lengths, shared in (((5, 20, 9), 0), ((30, 31), 4), ((7, 7, 40), 6)):
        tokens = [torch.randint(3, 90, (n,)).tolist() for n in lengths]
        rows = whole_rows([[1] * shared + ids for ids in tokens])
        batch = batch_of(rows, [1.0] * len(rows), "cpu", share_prefixes=bool(shared))
        outputs = []
        for policy in (eager, compiled):
            hidden_TD = hidden_states(policy, batch)
            outputs.append([hidden_TD, *gradients(policy, hidden_TD.square().mean())])
        for a, b in zip(*outputs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
