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

from turnfast.cli import main
from turnfast.config.recipe import build_config, load_config
from turnfast.doctor.memory import HEAD_CHUNK_BYTES, Estimate, SamplerMemory, estimate, verdict
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

    def process_bytes(name):
        text = Path("/proc/self/status").read_text()
        return int(re.search(name + r":\\s+(\\d+)", text)[1]) * 1024

    def step(tokens):
        context = config.rollout.max_context
        draw = torch.Generator().manual_seed(0)
        turns, prompt = [], torch.randint(3, 280, (context // 4,), generator=draw).tolist()
        length = context - len(prompt)
        while len(turns) * length + context <= tokens:
            ids = torch.randint(3, 280, (length + 1,), generator=draw).tolist()
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

    load_policy(config.model, Path(config.model.path), torch.device("cpu"))  # imports and caches
    ctypes.CDLL(None).malloc_trim(0)
    before = process_bytes("VmRSS")
    policy = load_policy(config.model, Path(config.model.path), torch.device("cpu"))
    optimizer = Optimizer(policy.model.parameters(), config.optim)
    step(2 * config.rollout.max_context)
    tokens = step(config.train.tokens_per_microbatch)
    print(json.dumps({"peak": process_bytes("VmHWM") - before, "tokens": tokens}))
"""


def recipe(folder: Path, **changed: dict) -> dict:
    """Sections of a recipe; `changed` adds fields to its sections."""
    sections = {
        "model": {"path": str(folder), "dtype": "float32"},
        "rollout": {"max_new_tokens": 32, "max_context": 512},
        "sampler": {"backend": "local", "max_sequences": 8},
        "train": {"tokens_per_microbatch": 6144, "device": "cpu"},
    }
    return {
        name: {**sections.get(name, {}), **changed.get(name, {})} for name in sections | changed
    }


def estimate_of(folder: Path, **changed: dict) -> Estimate:
    return estimate(build_config(recipe(folder, **changed)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    return write_tiny_model(path, CORPUS, seed=0, layers=4, width=192, max_context=512)


def measure_peak(sections: dict) -> dict:
    command = [sys.executable, "-c", textwrap.dedent(CHILD), json.dumps(sections)]
    # return freed memory to the system at once, so that only tensors are measured and not the
    # unused parts of the C library's heap
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
def test_estimate_is_near_the_measured_peak(folder, changed):
    measured = measure_peak(recipe(folder, **changed))
    estimated = estimate_of(folder, **changed)
    assert measured["tokens"] > 0.9 * estimated.tokens
    assert estimated.training == pytest.approx(measured["peak"], rel=TOLERANCE)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize(("state", "bytes_per_weight"), [("float32", 18), ("bfloat16", 14)])
def test_estimate_of_a_bfloat16_model_is_near_the_measured_peak(state, bytes_per_weight, tmp_path):
    """A wide model and few tokens, so that the bytes per weight dominate."""
    folder = write_tiny_model(tmp_path, CORPUS, seed=0, layers=4, width=512, max_context=64)
    sections = {
        "model": {"dtype": "bfloat16"},
        "optim": {"state": state},
        "rollout": {"max_context": 64},
        "train": {"tokens_per_microbatch": 128},
    }
    memory = estimate_of(folder, **sections)
    of_weights = memory.weights + memory.gradients + memory.optimizer
    assert of_weights / memory.parameters == pytest.approx(bytes_per_weight, abs=0.2)
    measured = measure_peak(recipe(folder, **sections))["peak"]
    assert memory.training == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    "architecture", [LlamaConfig, Qwen2Config, MistralConfig, GemmaConfig], ids=lambda c: c.__name__
)
def test_estimate_of_every_model_family(architecture, tmp_path):
    config = architecture(**{**SMALL, "max_position_embeddings": 512})
    config.save_pretrained(tmp_path)
    memory = estimate_of(tmp_path)
    model = AutoModelForCausalLM.from_config(config)
    assert memory.parameters == sum(p.numel() for p in model.parameters())
    assert memory.gradients == 4 * memory.parameters and memory.optimizer == 2 * memory.gradients
    assert memory.sampler.awake == 2 * 2 * 2 * 8 * 4 * 512 * 8
    doubled = estimate_of(tmp_path, train={"tokens_per_microbatch": 12288})
    # less than double where the masks of the tree tiles reach their limit
    assert 1.5 < doubled.activations / memory.activations < 2.1
    low = estimate_of(tmp_path, optim={"state": "bfloat16"})
    assert 2 * low.optimizer == memory.optimizer
    half = estimate_of(tmp_path, model={"dtype": "bfloat16"})
    assert half.weights < 0.6 * memory.weights and half.optimizer == 12 * memory.parameters
    # float32 sums, and one gradient at a time in bfloat16; the head has none besides its sum
    head = model.get_output_embeddings().weight
    largest = max(p.numel() for p in model.parameters() if p is not head)
    assert half.gradients == memory.gradients + 2 * largest
    assert half.loss_head == memory.loss_head


def test_sampler_memory(folder, tmp_path, monkeypatch):
    """With overlap the sampler has its own weights; vLLM on a CPU has a bounded cache."""
    importance_weight = {"is_cap": 2.0}
    plain = estimate_of(folder, loss=importance_weight)
    overlap = estimate_of(folder, loss=importance_weight, train={"overlap": True})
    assert overlap.sampler.awake == plain.sampler.awake + plain.weights
    assert overlap.sampler.asleep == overlap.sampler.awake
    (tmp_path / "vllm.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    vllm = {"backend": "vllm", "max_sequences": 10**6}
    assert estimate_of(folder, sampler=vllm).sampler.awake == plain.weights + CPU_CACHE_BYTES
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    assert estimate_of(folder, sampler=vllm).sampler.awake == plain.weights + (3 << 30)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({}, r"fits: 0\.5 GiB of 1\.0 GiB"),
        ({"activations": 1 << 31}, r"does not fit: 2\.4 GiB of 1\.0 .*tokens_per_microbatch"),
        ({"optimizer": 1 << 31}, r"does not fit: 2\.5 GiB .*lora\.r, or set optim\.state"),
        ({"awake": 1 << 31}, r"does not fit: 2\.1 GiB .*sampler\.max_sequences"),
        ({"available": None}, r"needs 0\.5 GiB; .* unknown"),
    ],
)
def test_verdict(folder, changed, text):
    sizes = dict.fromkeys(("weights", "gradients", "activations", "loss_head"), 1 << 27)
    sizes |= dict.fromkeys(("optimizer", "workspace", "merged"), 0)
    sampler = SamplerMemory(backend="local", sequences=8, awake=changed.pop("awake", 0), asleep=0)
    memory = replace(
        estimate_of(folder), **{**sizes, "sampler": sampler, "available": 1 << 30, **changed}
    )
    assert re.fullmatch(text + ".*", verdict(memory))


def test_cuda_chunk_size_is_the_workspace_of_the_loss_head():
    triton_head = pytest.importorskip("turnfast.kernels.loss_head.triton.head")
    assert HEAD_CHUNK_BYTES["cuda"] == triton_head.WORKSPACE_BYTES


SIZES = {
    "search": dict(hidden_size=1536, intermediate_size=8960, num_attention_heads=12,
        num_hidden_layers=28, num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True),
    "search_lora": dict(hidden_size=3584, intermediate_size=18944, num_attention_heads=28,
        num_hidden_layers=28, num_key_value_heads=4, vocab_size=152064),
}  # fmt: skip
GPU_BYTES = 79 << 30


@pytest.mark.parametrize(("name", "path"), [("search", "1.5B"), ("search_lora", "7B")])
def test_shipped_search_recipes_fit_a_gpu_of_80_gb(name, path, tmp_path):
    """Trainer and vLLM together, estimated on a CPU and corrected for a GPU."""
    assert load_config(name).model.path == f"Qwen/Qwen2.5-{path}-Instruct"
    Qwen2Config(max_position_embeddings=32768, **SIZES[name]).save_pretrained(tmp_path)
    # only the CPU gathers the keys of a tree's tiles
    flags = [f"--model.path={tmp_path}", "--model.dtype=bfloat16", "--train.device=cpu"]
    config = load_config(name, [*flags, "--train.share-prefixes=false"])
    memory = estimate(config)
    training = memory.training + HEAD_CHUNK_BYTES["cuda"] - HEAD_CHUNK_BYTES["cpu"]
    engine = config.sampler.gpu_memory * GPU_BYTES
    assert memory.weights + (1 << 34) < engine  # its own weights, and 16 GiB for the cache
    assert 0.7 * GPU_BYTES < training + engine < 0.9 * GPU_BYTES


def test_dry_run_prints_and_writes_nothing(tmp_path, monkeypatch, capsys):
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
def test_dry_run_reports_a_missing_package(package, flags, text, monkeypatch, capsys):
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
    """Turn the model into a GPT-J, which has its own attention code."""
    document = {"model_type": "gptj", "n_embd": 32, "n_layer": 1, "n_head": 2, "rotary_dim": 4}
    (model / "config.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (remove_template, "chat template"),
        (remove_config, "cannot be loaded as a model"),
        (
            shorten_positions,
            "rollout.max_context: 256 tokens, but qwen3 has max_position_embeddings = 255",
        ),
        (make_gptj, "gptj does not use transformers' attention interface"),
    ],
)
def test_dry_run_reports_a_model_that_cannot_be_trained(damage, text, folder, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    words = ["train", "demo", "--dry-run", "--model.path", str(model)]
    assert main(words) == 0
    damage(model)
    capsys.readouterr()
    assert main(words) == 2
    assert text in capsys.readouterr().err
