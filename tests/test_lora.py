"""LoRA adapters: gradients, checkpoints, and the merged weights for samplers."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from step_data import make_groups, optimizer_of
from test_update import TEMPERATURE, plain_logprobs
from training_runs import LETTERS, logged, recipe, training_lines, weights
from transformers import AutoModelForCausalLM

from turnfast.cli import main
from turnfast.config.recipe import build_config, load_config, to_toml
from turnfast.config.schema import LoraConfig, LossConfig, ModelConfig, SamplerConfig
from turnfast.credit import assign_credits
from turnfast.doctor.memory import Estimate, estimate
from turnfast.errors import ConfigError, SyncError
from turnfast.model import Policy, load_policy
from turnfast.model.lora import adapted_layers, add_adapter, merged, merged_copy, without_adapter
from turnfast.packing.pack import pack
from turnfast.rundir.checkpoint import (
    CheckpointError,
    TrainingState,
    load_checkpoint,
    save_checkpoint,
)
from turnfast.sampler import Sampler
from turnfast.sampler.open import open_sampler
from turnfast.sampler.sync import make_probe, sync_weights
from turnfast.train import train
from turnfast.update.learner import Learner
from turnfast.update.reference import open_reference, with_reference
from turnfast.update.update import update

pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = LoraConfig(r=4, lora_alpha=8)
RUN = {"model__lora": {"r": 4, "lora_alpha": 8}, "loss__kl_coef": 0.05}
IDS = torch.arange(3, 40)[None]


@pytest.fixture
def adapted(policy: Policy) -> Policy:
    add_adapter(policy.model, CONFIG, seed=0)
    return policy


def perturb_adapter(policy: Policy, seed: int = 0) -> None:
    """Change the adapter as training does: B is no longer 0."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


@torch.no_grad()
def logits(model, ids=IDS) -> torch.Tensor:
    return model(input_ids=ids).logits


def batches_of(budget: int = 4096):
    groups = make_groups(1)
    packed = pack(groups, assign_credits(groups), budget=budget)
    return packed.batches, [t for group in groups for t in group.trajectories]


def save(policy: Policy, folder: Path) -> Path:
    return save_checkpoint(folder, 1, training_state(policy), progress={}, keep=1)


def training_state(policy: Policy) -> TrainingState:
    return TrainingState(
        model=policy.model, optimizer=optimizer_of(policy), tokenizer=policy.tokenizer
    )


def plain_policy(folder: Path) -> Policy:
    return load_policy(ModelConfig(), folder, torch.device("cpu"))


def test_adapter_starts_as_the_base_model_for_any_seed(policy, tiny_folder):
    before = logits(policy.model)
    add_adapter(policy.model, CONFIG, seed=0)
    assert torch.equal(logits(policy.model), before)
    again, other = plain_policy(tiny_folder), plain_policy(tiny_folder)
    state = torch.random.get_rng_state()
    add_adapter(again.model, CONFIG, seed=0)
    add_adapter(other.model, CONFIG, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    ours = dict(policy.model.named_parameters())
    assert all(torch.equal(ours[name], p) for name, p in again.model.named_parameters())
    assert any(not torch.equal(ours[name], p) for name, p in other.model.named_parameters())


def test_reference_is_the_base_model(adapted, tiny_folder):
    perturb_adapter(adapted)
    kl = LossConfig(kl_coef=0.3)
    reference = open_reference(kl, ModelConfig(), adapted)
    assert reference is adapted
    batches, trajectories = batches_of()
    base = plain_policy(tiny_folder)
    found = with_reference(batches, reference, kl, temperature=TEMPERATURE)
    expected = with_reference(batches, base, kl, temperature=TEMPERATURE)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.ref_logprobs_N, b.ref_logprobs_N)
    with torch.no_grad():
        gap = torch.cat(
            [plain_logprobs(base.model, t) - plain_logprobs(adapted.model, t) for t in trajectories]
        )
    learner = Learner(policy=adapted, optimizer=optimizer_of(adapted, 1e-12))
    result = update(learner, found, kl, temperature=TEMPERATURE)
    assert result.kl.value == pytest.approx(float((gap.exp() - gap - 1).mean()), rel=1e-4)


def test_reference_folder_is_loaded_without_an_adapter(adapted, tiny_folder):
    perturb_adapter(adapted)
    kl = LossConfig(kl_coef=0.3, reference=str(tiny_folder))
    reference = open_reference(kl, ModelConfig(lora=CONFIG), adapted)
    assert reference is not adapted and not adapted_layers(reference.model)


@pytest.mark.parametrize(
    ("targets", "layers"), [((), 14), (("q_proj", "v_proj"), 4), (("1.mlp.up_proj",), 1)]
)
def test_a_step_changes_only_the_adapter(policy, targets, layers):
    add_adapter(policy.model, LoraConfig(r=4, target_modules=targets), seed=0)
    assert len(adapted_layers(policy.model)) == layers
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    batches, _ = batches_of()
    optimizer = optimizer_of(policy)
    for _ in range(2):  # A has no gradient while B is 0
        update(Learner(policy=policy, optimizer=optimizer), batches, LossConfig())
        assert policy.head_VD.grad is None
    after = dict(policy.model.named_parameters())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".lora_" in name}


def test_gradient_follows_from_the_merged_weight(adapted):
    """dL/dB = s dL/dW A^T and dL/dA = s B^T dL/dW, with dL/dW of the merged model."""
    perturb_adapter(adapted)
    batches, _ = batches_of()
    plain = replace(adapted, model=merged_copy(adapted.model))
    plain.model.requires_grad_(True)
    ours, theirs = optimizer_of(adapted, 1e-12), optimizer_of(plain, 1e-12)
    update(Learner(policy=adapted, optimizer=ours), batches, LossConfig())
    update(Learner(policy=plain, optimizer=theirs), batches, LossConfig())
    trained = [n for n, p in adapted.model.named_parameters() if p.requires_grad]
    found = dict(zip(trained, ours.gradients[0], strict=True))
    names = [name for name, _ in plain.model.named_parameters()]
    wanted = dict(zip(names, theirs.gradients[0], strict=True))
    for name, layer in adapted_layers(adapted.model).items():
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        dW, scale = wanted[f"{name}.weight"], 8 / 4
        for leaf, exact in (("A", scale * B.T @ dW), ("B", scale * dW @ A.T)):
            gradient = found[f"{name}.lora_{leaf}.default.weight"]
            torch.testing.assert_close(gradient, exact, atol=2e-6, rtol=1e-3)


def test_checkpoint_has_the_merged_model_and_the_adapter_for_peft(adapted, tmp_path):
    import peft

    perturb_adapter(adapted)
    path = save(adapted, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(path)
    assert not adapted_layers(plain)
    assert (logits(plain) - logits(adapted.model)).abs().max() < 1e-5
    assert [file.name for file in path.glob("*.safetensors")] == ["model.safetensors"]
    names = set(load_file(path / "model.safetensors"))
    assert names == set(load_file(adapted.folder / "model.safetensors"))
    base = AutoModelForCausalLM.from_pretrained(adapted.folder)
    by_peft = peft.PeftModel.from_pretrained(base, path / "adapter")
    assert torch.equal(logits(by_peft.eval()), logits(adapted.model))


def test_merged_bfloat16_weights_are_rounded_once(tiny_folder):
    policy = load_policy(ModelConfig(dtype="bfloat16"), tiny_folder, torch.device("cpu"))
    add_adapter(policy.model, CONFIG, seed=0)
    perturb_adapter(policy)
    found = dict(merged(policy.model, policy.model.named_parameters()))
    copied = merged_copy(policy.model).state_dict()
    for name, layer in adapted_layers(policy.model).items():
        A, B = (x["default"].weight.double() for x in (layer.lora_A, layer.lora_B))
        exact = layer.base_layer.weight.double() + 2 * B @ A
        assert torch.equal(found[f"{name}.weight"], exact.to(torch.bfloat16))
        assert torch.equal(copied[f"{name}.weight"], exact.to(torch.bfloat16))


def sampler_of(policy: Policy, *, overlap: bool) -> Sampler:
    config = SamplerConfig(backend="local", max_sequences=8)
    return open_sampler(config, policy, stop_ids=[2], max_context=128, overlap=overlap)


@pytest.mark.parametrize("overlap", [False, True])
def test_local_sampler_uses_the_adapter(adapted, overlap):
    sampler = sampler_of(adapted, overlap=overlap)
    probe = make_probe(len(adapted.head_VD), 128)
    for seed in range(3):
        assert sync_weights(adapted.model, sampler, probe, 1e-4) < 1e-4
        perturb_adapter(adapted, seed)


def test_sync_without_merging_is_an_error(adapted):
    sampler = sampler_of(adapted, overlap=True)
    probe = make_probe(len(adapted.head_VD), 128)
    perturb_adapter(adapted)
    kept = sampler.load_weights
    with without_adapter(adapted.model):
        base = {n.replace(".base_layer", ""): p for n, p in adapted.model.named_parameters()}
    base = {name: p for name, p in base.items() if ".lora_" not in name}
    sampler.load_weights = lambda named: kept(base.items())
    with pytest.raises(SyncError, match="differ from the trainer's"):
        sync_weights(adapted.model, sampler, probe, 1e-4)
    sampler.load_weights = lambda named: kept(adapted.model.named_parameters())
    with pytest.raises(SyncError, match="no parameter"):
        sync_weights(adapted.model, sampler, probe, 1e-4)


def test_train_and_eval(letters_model, tmp_path, capsys):
    """Train a few steps on the command line and evaluate the checkpoint."""
    toml = tmp_path / "run.toml"
    toml.write_text(to_toml(recipe(letters_model, **RUN)) + "\n")
    run = tmp_path / "run"
    assert main(["train", str(toml), "--run-dir", str(run)]) == 0
    lines = training_lines(run)
    assert lines[0]["kl"] == pytest.approx(0.0, abs=1e-9) and lines[-1]["kl"] > 1e-4
    assert all(line["logprob_gap"] < 1e-4 for line in lines)
    folder = run / "checkpoints" / "step_000004"
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["r"] == 4
    capsys.readouterr()
    assert main(["eval", str(toml), "--model.path", str(folder)]) == 0
    assert "eval/exact_match" in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("changed", [{}, {"credit__rule": "mt_ppo"}], ids=["group", "critic"])
def test_resumed_run_repeats_bitwise(letters_model, tmp_path, changed):
    train(recipe(letters_model, **RUN, **changed), tmp_path / "straight")
    train(recipe(letters_model, train__steps=2, **RUN, **changed), tmp_path / "resumed")
    train(recipe(letters_model, **RUN, **changed), tmp_path / "resumed", resume=True)
    assert weights(tmp_path / "straight", 4) == weights(tmp_path / "resumed", 4)
    name = "checkpoints/step_000004/adapter/adapter_model.safetensors"
    assert (tmp_path / "straight" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes()
    assert logged(tmp_path / "straight") == logged(tmp_path / "resumed")


def test_sft_writes_the_merged_model(letters_model, tmp_path, capsys):
    toml = tmp_path / "run.toml"
    toml.write_text(to_toml(recipe(letters_model, sft__steps=8, sft__lr=2e-2, **RUN)) + "\n")
    assert main(["sft", str(toml), "--run-dir", str(tmp_path / "sft")]) == 0
    lines = training_lines(tmp_path / "sft")
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "sft" / "model")
    assert not adapted_layers(plain)
    base = load_file(letters_model / "model.safetensors")
    assert not torch.equal(plain.state_dict()["model.layers.0.mlp.up_proj.weight"],
                           base["model.layers.0.mlp.up_proj.weight"])  # fmt: skip


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (LoraConfig(r=8, lora_alpha=8), "r = 4 and lora_alpha = 8"),
        (LoraConfig(r=4, lora_alpha=16), "r = 4 and lora_alpha = 8"),
        (LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj",)), "has other layers"),
    ],
)
def test_other_adapter_is_an_error(adapted, tiny_folder, tmp_path, form, message):
    path = save(adapted, tmp_path)
    other = plain_policy(tiny_folder)
    add_adapter(other.model, form, seed=0)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path, training_state(other))
    with pytest.raises(CheckpointError, match="no matching adapter"):
        plain = save(plain_policy(tiny_folder), tmp_path / "plain")
        load_checkpoint(plain, training_state(adapted))


def test_other_base_model_is_an_error(adapted, letters_model, tiny_folder, tmp_path):
    path = save(adapted, tmp_path)
    other = plain_policy(tiny_folder)
    with torch.no_grad():
        other.head_VD.add_(1e-3)
    add_adapter(other.model, CONFIG, seed=0)
    with pytest.raises(CheckpointError, match=r"another model.*model\.path"):
        load_checkpoint(path, training_state(other))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q_proj", "query"), "no linear layer query; available: down_proj, gate_proj, k_proj"),
        (("mlp",), "no linear layer mlp"),
        (("embed_tokens",), "no linear layer embed_tokens"),
        (("lm_head",), "lm_head is the output projection"),
    ],
)
def test_unknown_targets_are_errors(policy, targets, message):
    form = LoraConfig(r=4, target_modules=targets)
    with pytest.raises(ConfigError, match=rf"model\.lora\.target_modules: .*{message}"):
        add_adapter(policy.model, form, seed=0)


def test_unusable_settings_name_the_field(policy, letters_model, monkeypatch, capsys, tmp_path):
    with pytest.raises(ConfigError, match=r"model\.lora\.rank: no such field"):
        build_config({"model": {"lora": {"rank": 4}}})
    toml = tmp_path / "run.toml"
    toml.write_text(to_toml(recipe(letters_model)) + "\n")
    flags = ["--model.lora.r", "4", "--model.lora.target-modules", '["query"]']
    assert main(["train", str(toml), *flags, "--dry-run"]) == 2
    assert "no linear layer query" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs peft; install turnfast\[lora\]"):
        add_adapter(policy.model, CONFIG, seed=0)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM")
def test_rounded_adapter_needs_an_importance_weight(letters_model, capsys, tmp_path):
    toml = tmp_path / "run.toml"
    toml.write_text(to_toml(recipe(letters_model, **RUN)) + "\n")
    rounded = ["--model.dtype=bfloat16", "--sampler.backend=vllm"]
    for dry in ([], ["--dry-run"]):
        command = ["train", str(toml), "--run-dir", str(tmp_path / "run"), *dry]
        assert main([*command, *rounded]) == 2
        errors = capsys.readouterr().err
        assert errors.startswith("turnfast: loss.is_cap: vLLM samples with the adapter merged")
        assert not (tmp_path / "run").exists()
    for fix in (
        ["--model.dtype=float32"],
        ["--sampler.backend=local"],
        ["--loss.is-cap=2.0"],
        ["--loss.old-logprobs=sampler"],
        ["--model.lora={r = 0}"],
    ):
        assert main(["train", str(toml), "--dry-run", *rounded, *fix]) == 0


def test_recipe_round_trip(tmp_path):
    config = build_config({**LETTERS, "model": {"lora": {"r": 8, "target_modules": ["q_proj"]}}})
    (tmp_path / "run.toml").write_text(to_toml(config) + "\n")
    assert load_config(tmp_path / "run.toml") == config
    assert config.model.lora.target_modules == ("q_proj",)


def test_estimate_counts_only_the_adapter(tiny_folder, policy):
    def sizes(dtype: str, r: int, reference: str = "start") -> Estimate:
        tree = {
            "model": {"path": str(tiny_folder), "dtype": dtype, "lora": {"r": r}},
            "rollout": {"max_new_tokens": 32, "max_context": 512},
            "sampler": {"backend": "local"},
            "train": {"tokens_per_microbatch": 2048, "device": "cpu"},
            "loss": {"kl_coef": 0.1, "reference": reference},
        }
        return estimate(build_config(tree))

    full, adapter = sizes("float32", 0), sizes("float32", 4)
    add_adapter(policy.model, CONFIG, seed=0)
    size = sum(p.numel() for p in policy.model.parameters() if p.requires_grad)
    assert adapter.gradients == 4 * size and adapter.optimizer == 8 * size
    assert adapter.weights == full.weights // 2 + 4 * size  # no copy for the reference
    assert adapter.loss_head == full.loss_head  # a float32 head adds to its gradient in place
    full_16, adapter_16 = sizes("bfloat16", 0), sizes("bfloat16", 4)
    assert adapter_16.loss_head == full_16.loss_head
    # the gradients of the full model include a float32 sum for the head
    assert full_16.gradients - adapter_16.gradients > 4 * (full_16.parameters - size)
    with_copy = sizes("float32", 4, reference=str(tiny_folder))
    assert with_copy.weights >= 2 * adapter.weights - 4 * size
