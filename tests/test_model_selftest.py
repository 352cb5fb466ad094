"""A model is the same model over packed rows and trees, or it is refused when it is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import FAMILIES, SMALL, policy_of, whole_rows
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GPT2Config,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    PhimoeConfig,
    RecurrentGemmaConfig,
)

import turnfast.model.attention
import turnfast.model.policy
from turnfast.config.recipe import build_config
from turnfast.config.schema import ModelConfig
from turnfast.doctor.memory import estimate
from turnfast.errors import ConfigError
from turnfast.model import hidden_states, load_policy
from turnfast.model.attention import packed_forward
from turnfast.model.selftest import check_logprobs
from turnfast.packing.pack import batch_of

CPU = torch.device("cpu")
DOGE = AutoConfig.for_model("doge", **SMALL, sliding_window=5)
GPT2 = dict(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=16)
OPT = dict(ffn_dim=48, num_hidden_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=97)


@pytest.fixture
def folder_of(tiny_folder, tmp_path):
    def write(config, dtype=torch.float32) -> Path:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # weights as large as trained ones, so that what is left out counts
                parameter.mul_(1.0 if "norm" in name else 4.0)
        model.to(dtype).save_pretrained(tmp_path)
        AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path)
        return tmp_path

    return write


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_is_computed_is_accepted(family, dtype, folder_of):
    load_policy(ModelConfig(dtype=dtype), folder_of(FAMILIES[family]), CPU)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PhiConfig(**SMALL), r"the output projection of phi has a bias"),
        (Gemma2Config(**SMALL), r"gemma2 caps its attention logits"),
        (RecurrentGemmaConfig(**SMALL), r"recurrent_gemma has layers of type recurrent"),
        (DOGE, r"doge cannot be run over packed rows, its code fails there: AttributeError"),
        (
            PhimoeConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2, sliding_window=5),
            r"over packed rows the log-probs of phimoe differ by [\d.]+ on average",
        ),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_a_model_that_is_not_computed_is_refused(config, message, folder_of):
    with pytest.raises(ConfigError, match=rf"^model\.path: {message}"):
        load_policy(ModelConfig(), folder_of(config), CPU)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PhiConfig(**SMALL), r"the output projection of phi has a bias"),
        (RecurrentGemmaConfig(**SMALL), r"recurrent_gemma has layers of type recurrent"),
    ],
    ids=["phi", "recurrent_gemma"],
)
def test_a_dry_run_refuses_what_shows_without_weights(config, message, tmp_path):
    config.save_pretrained(tmp_path)
    rollout = {"max_context": 64, "max_new_tokens": 16}
    recipe = {"model": {"path": str(tmp_path)}, "rollout": rollout, "train": {"device": "cpu"}}
    with pytest.raises(ConfigError, match=rf"^model\.path: {message}"):
        estimate(build_config(recipe))


def leak(module, inputs, out):
    return (out[0] if isinstance(out, tuple) else out).cumsum(1)


def shift(module, inputs, out):
    return out + torch.arange(out.shape[-1])


def noise(module, inputs, out):
    return torch.nn.functional.dropout(out, 0.1, module.training)


@pytest.mark.parametrize(
    ("part", "fault"),
    [("model.layers.0.mlp", leak), ("lm_head", shift), ("model.layers.1.mlp", noise)],
)
def test_what_no_name_is_known_for_is_refused(part, fault):
    """State that runs from row to row, other logits, and what only happens in training."""
    policy = policy_of(FAMILIES["llama"])
    policy.model.train()
    check_logprobs(policy)
    policy.model.get_submodule(part).register_forward_hook(fault)
    with pytest.raises(ConfigError, match=r"log-probs of llama differ by [\d.]+ .*take another"):
        check_logprobs(policy)


@pytest.mark.parametrize("changed", [{"softcap": 0.1}, {"logit_scale": 0.5}])
def test_logits_other_than_the_model_s_own_are_refused(changed):
    with pytest.raises(ConfigError, match=r"differ by [\d.]+ on average .*rounding allows 0\.0001"):
        check_logprobs(replace(policy_of(FAMILIES["qwen3"]), **changed))


@pytest.mark.parametrize("function", ["packed_attention", "tree_attention"])
@pytest.mark.parametrize("window", [5, 70, 100])
def test_a_window_that_is_not_kept_is_refused(window, function, monkeypatch):
    policy = policy_of(MistralConfig(**{**SMALL, "initializer_range": 0.3}, sliding_window=window))
    check_logprobs(policy)
    attend = getattr(turnfast.model.attention, function)

    def with_all(*qkv_rows, scale, window):
        return attend(*qkv_rows, scale=scale)

    monkeypatch.setattr(turnfast.model.attention, function, with_all)
    shape = "packed rows" if function == "packed_attention" else "a prefix tree"
    with pytest.raises(ConfigError, match=f"over {shape} the log-probs of mistral differ"):
        check_logprobs(policy)


def test_damaged_weights_are_called_so():
    policy = policy_of(FAMILIES["llama"])
    with torch.no_grad():
        policy.model.model.norm.weight[0] = torch.nan
    with pytest.raises(ConfigError, match=r"llama gives log-probs that are not finite"):
        check_logprobs(policy)


def test_it_leaves_the_model_and_the_random_numbers_as_they_are():
    policy = policy_of(FAMILIES["qwen3"])
    for training in (True, False):
        policy.model.train(training)
        before = torch.get_rng_state()
        check_logprobs(policy)
        assert torch.equal(before, torch.get_rng_state())
        assert policy.model.training is training
        assert policy.model.config._attn_implementation == "turnfast"
        assert all(p.grad is None for p in policy.model.parameters())


def test_a_packed_forward_without_rows_is_refused():
    policy = policy_of(FAMILIES["llama"])
    ids = torch.arange(8)[None]
    policy.model(ids)
    with packed_forward(), pytest.raises(NotImplementedError, match="LlamaAttention does not pass"):
        policy.model(ids)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (GPT2Config(**GPT2, attn_pdrop=0.3, resid_pdrop=0.3, embd_pdrop=0.3), "resid_pdrop"),
        (OPTConfig(**OPT, attention_dropout=0.3, dropout=0.3, layerdrop=0.5), "dropout"),
    ],
    ids=["gpt2", "opt"],
)
def test_dropout_is_off_and_stays_in_the_config(config, name, folder_of):
    policy = load_policy(ModelConfig(), folder_of(config), CPU)
    batch = batch_of(whole_rows([[5, 6, 7, 8], [5, 6, 9]]), [1.0] * 2, "cpu")
    assert policy.model.training
    assert torch.equal(hidden_states(policy, batch), hidden_states(policy, batch))
    assert getattr(policy.model.config, name) == 0.3


def test_a_mask_of_the_model_s_own_is_refused():
    policy = policy_of(FAMILIES["llama"])
    rows = turnfast.model.policy._attention_rows(
        policy, batch_of(whole_rows([[5, 6]]), [1.0], "cpu")
    )
    q = torch.zeros(1, 4, 2, 8)
    with pytest.raises(NotImplementedError, match="a mask of its own"):
        turnfast.model.attention._attend(
            policy.model, q, q, q, torch.ones(1, 1, 2, 2), packed_rows=rows
        )
