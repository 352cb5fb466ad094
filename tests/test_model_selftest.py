"""The check at load time: accept supported models, reject models with other log-probs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import FAMILIES, SMALL, policy_of, whole_rows
from letters import Letters
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GPT2Config,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    PhimoeConfig,
    RecurrentGemmaConfig,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from turnfast.kernels.attention import PackedRows, TreeRows

from turnfast.config.recipe import build_config
from turnfast.config.schema import ModelConfig
from turnfast.doctor.checks import check_model
from turnfast.errors import ConfigError
from turnfast.model import ATTENTION, hidden_states, load_policy
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
                # as large as trained weights, so that a missing feature changes the log-probs
                parameter.mul_(1.0 if "norm" in name else 4.0)
        model.to(dtype).save_pretrained(tmp_path)
        AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path)
        return tmp_path

    return write


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_supported_family_is_accepted(family, dtype, folder_of):
    load_policy(ModelConfig(dtype=dtype), folder_of(FAMILIES[family]), CPU)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PhiConfig(**SMALL), r"the output projection of phi has a bias"),
        (Gemma2Config(**SMALL), r"gemma2 caps its attention logits"),
        (RecurrentGemmaConfig(**SMALL), r"recurrent_gemma has layers of type recurrent"),
        (
            MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1, state_size=4),
            r"mamba has layers of type linear",
        ),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_unsupported_family_is_rejected(config, message, folder_of):
    """When the model is loaded, and in a dry run without its weights."""
    folder = folder_of(config)
    with pytest.raises(ConfigError, match=rf"^model\.path: {message}"):
        load_policy(ModelConfig(), folder, CPU)
    recipe = {"model": {"path": str(folder)}, "train": {"device": "cpu"}}
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=rf"^model\.path: {message}"):
        check_model(build_config(recipe), Letters())


def test_family_with_other_log_probs_is_rejected(folder_of):
    config = PhimoeConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2, sliding_window=5)
    message = r"^model\.path: with packed rows the log-probs of phimoe differ by [\d.]+ on average"
    with pytest.raises(ConfigError, match=message):
        load_policy(ModelConfig(), folder_of(config), CPU)


def test_failing_model_code_names_the_field(folder_of):
    with pytest.raises(AttributeError) as raised:
        load_policy(ModelConfig(), folder_of(DOGE), CPU)
    assert raised.value.__notes__ == ["model.path: doge fails with packed rows; use another model"]


def mix_rows(module, inputs, out):
    return (out[0] if isinstance(out, tuple) else out).cumsum(1)


def shift_logits(module, inputs, out):
    return out + torch.arange(out.shape[-1])


def dropout(module, inputs, out):
    return torch.nn.functional.dropout(out, 0.1, module.training)


@pytest.mark.parametrize(
    ("part", "fault"),
    [
        ("model.layers.0.mlp", mix_rows),
        ("lm_head", shift_logits),
        ("model.layers.1.mlp", dropout),
    ],
)
def test_other_log_probs_are_rejected(part, fault):
    """State carried from row to row, changed logits, and dropout in training mode only."""
    policy = policy_of(FAMILIES["llama"])
    policy.model.train()
    check_logprobs(policy)
    policy.model.get_submodule(part).register_forward_hook(fault)
    with pytest.raises(ConfigError, match=r"log-probs of llama differ by [\d.]+ .*use another"):
        check_logprobs(policy)


@pytest.mark.parametrize("changed", [{"softcap": 0.1}, {"logit_scale": 0.5}])
def test_wrong_logit_settings_are_rejected(changed):
    with pytest.raises(ConfigError, match=r"differ by [\d.]+ on average .*more than 0\.0001"):
        check_logprobs(replace(policy_of(FAMILIES["qwen3"]), **changed))


@pytest.mark.parametrize("layout", ["packed rows", "a prefix tree"])
@pytest.mark.parametrize("window", [5, 70, 100])
def test_ignored_window_is_rejected(window, layout):
    policy = policy_of(MistralConfig(**{**SMALL, "initializer_range": 0.3}, sliding_window=window))
    check_logprobs(policy)
    rows_type = PackedRows if layout == "packed rows" else TreeRows

    def remove_window(module, args, options):
        if isinstance(options.get("packed_rows"), rows_type):
            return args, {**options, "attention_mask": 0}
        return None

    for layer in policy.model.model.layers:
        layer.self_attn.register_forward_pre_hook(remove_window, with_kwargs=True)
    with pytest.raises(ConfigError, match=f"with {layout} the log-probs of mistral differ"):
        check_logprobs(policy)


def test_damaged_weights_are_rejected():
    policy = policy_of(FAMILIES["llama"])
    with torch.no_grad():
        policy.model.model.norm.weight[0] = torch.nan
    with pytest.raises(ConfigError, match=r"llama gives log-probs that are not finite"):
        check_logprobs(policy)


def test_check_changes_neither_model_nor_random_state():
    policy = policy_of(FAMILIES["qwen3"])
    for training in (True, False):
        policy.model.train(training)
        before = torch.get_rng_state()
        check_logprobs(policy)
        assert torch.equal(before, torch.get_rng_state())
        assert policy.model.training is training
        assert policy.model.config._attn_implementation == ATTENTION
        assert all(p.grad is None for p in policy.model.parameters())


def test_packed_forward_without_rows_is_an_error():
    policy = policy_of(FAMILIES["llama"])
    ids = torch.arange(8)[None]
    policy.model(ids)
    with packed_forward(), pytest.raises(ConfigError, match="LlamaAttention does not pass"):
        policy.model(ids)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (GPT2Config(**GPT2, attn_pdrop=0.3, resid_pdrop=0.3, embd_pdrop=0.3), "resid_pdrop"),
        (OPTConfig(**OPT, attention_dropout=0.3, dropout=0.3, layerdrop=0.5), "dropout"),
    ],
    ids=["gpt2", "opt"],
)
def test_dropout_is_off_and_kept_in_the_config(config, name, folder_of):
    policy = load_policy(ModelConfig(), folder_of(config), CPU)
    batch = batch_of(whole_rows([[5, 6, 7, 8], [5, 6, 9]]), [1.0] * 2, "cpu")
    assert policy.model.training
    assert torch.equal(hidden_states(policy, batch), hidden_states(policy, batch))
    assert getattr(policy.model.config, name) == 0.3


@pytest.mark.parametrize(
    ("mask", "options", "message"),
    [
        (torch.ones(1, 1, 2, 2), {}, "makes its own attention mask"),
        (None, {"softcap": 3.0}, "attention with softcap"),
        (None, {"s_aux": torch.zeros(4)}, "attention with s_aux"),
        (None, {"dropout": 0.1}, "attention with dropout"),
    ],
)
def test_unsupported_attention_is_an_error(mask, options, message):
    rows = PackedRows(cu_seqlens=torch.tensor([0, 2]).int(), lengths=(2,), backend="sdpa")
    q, module = torch.zeros(1, 4, 2, 8), torch.nn.Identity()
    with pytest.raises(ConfigError, match=rf"^model\.path: Identity .*{message}"):
        ALL_ATTENTION_FUNCTIONS[ATTENTION](module, q, q, q, mask, packed_rows=rows, **options)
