"""The memory estimate against measured peaks, and the checks of a dry run."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import SMALL
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, MistralConfig, Qwen2Config
from turnfast.kernels.loss_head import cpp

from turnfast.cli import main
from turnfast.config.recipe import build_config, load_config
from turnfast.doctor.checks import check_training
from turnfast.doctor.memory import HEAD_CHUNK_BYTES, SamplerMemory, estimate, verdict
from turnfast.errors import ConfigError
from turnfast.model.tiny import write_tiny_model
from turnfast.sampler.vllm_start import CPU_CACHE_BYTES

# The estimate of training memory is within this share of the measured peak.
TOLERANCE = 0.3
CORPUS = ["user assistant tool result answer Who wrote Ulm? Ida wrote Ulm in Oslo."] * 50
CHILD = """
    import ctypes, json, re, sys
    from pathlib import Path
    import torch
    from turnfast.config.recipe import build_config
    from turnfast.model import load_policy
    from turnfast.packing.pack import batch_of
    from turnfast.packing.rows import rows_of
    from turnfast.types import Turn
    from turnfast.update.learner import Learner
    from turnfast.update.optimizer import Optimizer
    from turnfast.update.update import update

    torch.set_num_threads(1)
    config = build_config(json.loads(sys.argv[1]))

    def held(name):
        text = Path("/proc/self/status").read_text()
        return int(re.search(name + r":\\s+(\\d+)", text)[1]) * 1024

    def step(tokens):
        context = config.rollout.max_context
        draw = torch.Generator().manual_seed(0)
        turns, prompt = [], torch.randint(3, 280, (context // 4,), generator=draw).tolist()
        fresh = context - len(prompt)
        while len(turns) * fresh + context <= tokens:
            ids = torch.randint(3, 280, (fresh + 1,), generator=draw).tolist()
            turns.append(
                Turn(
                    prompt_ids=tuple(prompt), sampled_ids=tuple(ids),
                    logprobs=(-5.0,) * len(ids), text="", finish="stop",
                )
            )
        rows = rows_of([[turn] for turn in turns], [1.0 - i % 3 for i in range(len(turns))])
        weights = [1e-3] * len(rows)
        batch = batch_of(rows, weights, "cpu", share_prefixes=config.train.share_prefixes)
        update(Learner(policy=policy, optimizer=optimizer), [batch], config.loss)
        return len(batch.tokens_T)

    warm = load_policy(config.model, Path(config.model.path), torch.device("cpu"))
    del warm
    ctypes.CDLL(None).malloc_trim(0)
    before = held("VmRSS")
    policy = load_policy(config.model, Path(config.model.path), torch.device("cpu"))
    optimizer = Optimizer(policy.model.parameters(), config.optim)
    step(2 * config.rollout.max_context)
    tokens = step(config.train.tokens_per_microbatch)
    print(json.dumps({"peak": held("VmHWM") - before, "tokens": tokens}))
"""


def recipe(folder: Path, **changed) -> dict:
    train = {"tokens_per_microbatch": 6144, "device": "cpu", **changed.pop("train", {})}
    return {
        "model": {"path": str(folder), "dtype": "float32", **changed.pop("model", {})},
        "rollout": {"max_new_tokens": 32, "max_context": 512},
        "sampler": {"backend": "local", "max_sequences": 8},
        "train": train,
        **changed,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    return write_tiny_model(path, CORPUS, seed=0, layers=4, width=192, max_context=512)


def measured_peak(tree: dict) -> dict:
    command = [sys.executable, "-c", textwrap.dedent(CHILD), json.dumps(tree)]
    # freed memory goes back to the system at once: what is measured is what tensors hold, without
    # the holes that the C library keeps in its heap
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"train": {"share_prefixes": False}},
        {"model": {"checkpointing": True}, "optim": {"state": "bfloat16"}},
    ],
    ids=["trees", "rows", "checkpointing"],
)
def test_the_estimate_is_near_the_peak(folder, changed):
    tree = recipe(folder, **changed)
    measured = measured_peak(tree)
    found = estimate(build_config(tree))
    assert measured["tokens"] > 0.9 * found.tokens
    assert found.training == pytest.approx(measured["peak"], rel=TOLERANCE)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("state", ["float32", "bfloat16"])
def test_the_estimate_of_a_bf16_model_is_near_the_peak(state, tmp_path):
    """A wide model and few tokens: what counts is what every weight takes."""
    folder = write_tiny_model(tmp_path, CORPUS, seed=0, layers=4, width=512, max_context=64)
    tree = recipe(
        folder,
        model={"dtype": "bfloat16"},
        optim={"state": state},
        train={"tokens_per_microbatch": 128},
    )
    tree["rollout"]["max_context"] = 64
    found = estimate(build_config(tree))
    per_weight = (found.weights + found.gradients + found.optimizer) / found.parameters
    assert per_weight == pytest.approx(18 if state == "float32" else 14, abs=0.2)
    measured = measured_peak(tree)["peak"]
    assert found.training == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    "architecture", [LlamaConfig, Qwen2Config, MistralConfig, GemmaConfig], ids=lambda c: c.__name__
)
def test_every_family_is_counted(architecture, tmp_path):
    config = architecture(**{**SMALL, "max_position_embeddings": 512})
    config.save_pretrained(tmp_path)
    tree = recipe(tmp_path)
    found = estimate(build_config(tree))
    model = AutoModelForCausalLM.from_config(config)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.gradients == 4 * found.parameters and found.optimizer == 2 * found.gradients
    assert found.sampler.awake == 2 * 2 * 2 * 8 * 4 * 512 * 8
    doubled = estimate(build_config(recipe(tmp_path, train={"tokens_per_microbatch": 12288})))
    # the loss of a share is the masks of the tree tiles, which are kept up to a limit
    assert 1.5 < doubled.activations / found.activations < 2.1
    low = estimate(build_config(recipe(tmp_path, optim={"state": "bfloat16"})))
    assert 2 * low.optimizer == found.optimizer
    half = estimate(build_config(recipe(tmp_path, model={"dtype": "bfloat16"})))
    assert half.weights < 0.6 * found.weights and half.optimizer == 12 * found.parameters
    # sums are float32, and one gradient at a time is not; the head's is none of its own
    head = model.get_output_embeddings().weight
    largest = max(p.numel() for p in model.parameters() if p is not head)
    assert half.gradients == found.gradients + 2 * largest
    assert half.loss_head == found.loss_head
    frozen = estimate(build_config(recipe(tmp_path, model={"freeze_head": True})))
    assert frozen.gradients < found.gradients


def test_the_sampler_counts_as_it_is(folder, monkeypatch):
    """Beside training with a copy of the weights; an engine on a CPU with a bounded cache."""
    plain, beside = (
        estimate(build_config(recipe(folder, train={"overlap": overlap}, loss={"is_cap": 2.0})))
        for overlap in (False, True)
    )
    assert beside.sampler.awake == plain.sampler.awake + plain.weights
    assert beside.sampler.asleep == beside.sampler.awake
    monkeypatch.setattr("turnfast.doctor.memory.choose_backend", lambda config: "vllm")
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    tree = recipe(folder)
    tree["sampler"]["max_sequences"] = 10**6
    assert estimate(build_config(tree)).sampler.awake == plain.weights + CPU_CACHE_BYTES
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    assert estimate(build_config(tree)).sampler.awake == plain.weights + (3 << 30)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({}, r"fits: 0\.5 GiB of 1\.0 GiB"),
        ({"activations": 1 << 31}, r"does not fit: 2\.4 GiB of 1\.0 .*tokens_per_microbatch"),
        ({"optimizer": 1 << 31}, r"does not fit: 2\.5 GiB .*lora\.r, or set optim\.state"),
        ({"awake": 1 << 31}, r"does not fit: 2\.1 GiB .*sampler\.max_sequences"),
        ({"machine": None}, r"needs 0\.5 GiB; .* unknown"),
    ],
)
def test_the_verdict(folder, changed, text):
    sizes = dict.fromkeys(("weights", "gradients", "activations", "loss_head"), 1 << 27)
    sizes |= dict.fromkeys(("optimizer", "workspace", "merged"), 0)
    awake = changed.pop("awake", 0)
    sampler = SamplerMemory(backend="local", sequences=8, awake=awake, asleep=0)
    found = replace(
        estimate(build_config(recipe(folder))),
        **{**sizes, "sampler": sampler, "machine": 1 << 30, **changed},
    )
    assert re.fullmatch(text + ".*", verdict(found))


def test_the_chunk_sizes_are_those_of_the_loss_head():
    triton_head = pytest.importorskip("turnfast.kernels.loss_head.triton.head")
    assert {"cpu": cpp.LARGE_BYTES, "cuda": triton_head.WORKSPACE_BYTES} == HEAD_CHUNK_BYTES


SIZES = {
    "search": dict(hidden_size=1536, intermediate_size=8960, num_attention_heads=12,
        num_hidden_layers=28, num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True),
    "search_lora": dict(hidden_size=3584, intermediate_size=18944, num_attention_heads=28,
        num_hidden_layers=28, num_key_value_heads=4, vocab_size=152064),
}  # fmt: skip
GPU_BYTES = 79 << 30


@pytest.mark.parametrize(("name", "path"), [("search", "1.5B"), ("search_lora", "7B")])
def test_the_shipped_search_recipes_fit_a_gpu_of_80_gb(name, path, tmp_path):
    """Trainer and engine at the same time, with what a GPU changes put in by hand."""
    assert load_config(name).model.path == f"Qwen/Qwen2.5-{path}-Instruct"
    Qwen2Config(max_position_embeddings=32768, **SIZES[name]).save_pretrained(tmp_path)
    # the keys of a tree's tiles are gathered on a CPU alone
    flags = [f"--model.path={tmp_path}", "--model.dtype=bfloat16", "--train.device=cpu"]
    config = load_config(name, [*flags, "--train.share-prefixes=false"])
    found = estimate(config)
    training = found.training + HEAD_CHUNK_BYTES["cuda"] - HEAD_CHUNK_BYTES["cpu"]
    engine = config.sampler.gpu_memory * GPU_BYTES
    assert found.weights + (1 << 34) < engine  # its own weights, and 16 GiB for the cache
    assert 0.7 * GPU_BYTES < training + engine < 0.9 * GPU_BYTES


def test_a_dry_run_prints_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "demo", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("token budget  16,384")
    assert re.match(r"fits: [0-9.]+ GiB of |does not fit: ", lines[-1])
    assert list(tmp_path.iterdir()) == []
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("package", "flags", "text"),
    [
        ("liger_kernel", ["--model.liger", "true"], "model.liger: liger-kernel is not installed"),
        ("peft", ["--model.lora.r", "4"], "model.lora.r: an adapter needs peft"),
        ("vllm", ["--sampler.backend", "vllm"], "sampler.backend: 'vllm'"),
    ],
)
def test_a_missing_package_is_found_by_a_dry_run(package, flags, text, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *more: None if name == package else find(name, *more),
    )
    assert main(["train", "demo", "--dry-run", "--train.device", "cpu", *flags]) == 2
    assert text in capsys.readouterr().err


def remove_template(model: Path) -> None:
    for path in model.glob("chat_template*"):
        path.unlink()
    settings = model / "tokenizer_config.json"
    document = json.loads(settings.read_text())
    document.pop("chat_template", None)
    settings.write_text(json.dumps(document))


def remove_config(model: Path) -> None:
    (model / "config.json").unlink()


def shorten_positions(model: Path) -> None:
    document = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(document | {"max_position_embeddings": 255}))


def make_gptj(model: Path) -> None:
    """Turn the model into a GPT-J, which has attention code of its own."""
    document = {"model_type": "gptj", "n_embd": 32, "n_layer": 1, "n_head": 2, "rotary_dim": 4}
    (model / "config.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (remove_template, "chat template"),
        (remove_config, "cannot be loaded as a model"),
        (shorten_positions, "rollout.max_context: 256 tokens"),
        (make_gptj, "gptj does not use transformers' attention interface"),
    ],
)
def test_a_model_that_cannot_be_trained_is_found_by_a_dry_run(
    damage, text, folder, tmp_path, capsys
):
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    words = ["train", "demo", "--dry-run", "--model.path", str(model)]
    assert main(words) == 0
    damage(model)
    capsys.readouterr()
    assert main(words) == 2
    assert text in capsys.readouterr().err


def test_rows_longer_than_the_model_are_refused_with_both_numbers(folder):
    tree = recipe(folder)
    tree["rollout"]["max_context"] = 513
    with pytest.raises(ConfigError, match=r"rollout\.max_context: 513 .* = 512"):
        check_training(build_config(tree))
