"""The vLLM engine in this process, and weight sync into it; needs its own pytest process."""

from __future__ import annotations

import copy
import importlib.util
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import Qwen3ForCausalLM
from two_turns import (
    VOCAB,
    WithOtherLoad,
    check_abort,
    gap_of,
    request,
    same_samples,
    sample,
    tiny_qwen3,
    train_one_step,
    two_turns,
    without,
    worst_gap,
)

from turnfast.config.schema import LoraConfig, SamplerConfig
from turnfast.errors import SyncError
from turnfast.model import Policy, default_tolerance
from turnfast.model.lora import add_adapter
from turnfast.sampler.open import open_sampler
from turnfast.sampler.sync import Probe, compare, make_probe, sync_weights

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"),
        reason="vLLM does not run beside the Triton interpreter",
    ),
]

CONTEXT, STOP = 256, 1
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = default_tolerance(torch.float32, DEVICE)
PROBE = make_probe(VOCAB, CONTEXT)


@pytest.fixture(params=[PROBE, PROBE.short], ids=["long", "short"])
def probe(request) -> Probe:
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny-qwen3")
    model = tiny_qwen3(head_dim=32, pad_token_id=0, bos_token_id=None, eos_token_id=STOP)
    model.save_pretrained(path)
    return path


@pytest.fixture
def trainer(folder: Path) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator:
    policy = Policy(
        model=Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32),
        tokenizer=None,
        folder=folder,
        device=torch.device(DEVICE),
        attention="sdpa",
    )
    config = SamplerConfig(backend="vllm", max_sequences=64)
    rng, numbers = torch.random.get_rng_state(), random.getstate()
    threads = torch.get_num_threads()
    sampler = open_sampler(config, policy, stop_ids=(STOP,), max_context=CONTEXT)
    # the engine seeds generators and pins threads; the trainer must not notice
    assert torch.equal(rng, torch.random.get_rng_state()) and numbers == random.getstate()
    torch.set_num_threads(threads + 1)
    assert torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)
    yield sampler
    sampler.close()


@pytest.fixture
def sampler(engine, trainer):
    """The engine with the trainer's first weights and an empty cache."""
    engine.load_weights(trainer.named_parameters())
    return engine


@pytest.mark.skipif(DEVICE == "cuda", reason="asks for more memory than a CPU has")
def test_lack_of_memory_is_reported_in_one_line(letters_model):
    recipe = ["demo", "--env.name=calculator", "--env.options={}", f"--model.path={letters_model}"]
    done = subprocess.run(
        [sys.executable, "-m", "turnfast", "eval", *recipe, "--sampler.backend=vllm"],
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "100000"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("turnfast: sampler.backend: vLLM lacks memory to start; change")
    assert "VLLM_CPU_KVCACHE_SPACE" in line and "rollout.max_context = 256" in line
    assert "Error: Available memory on" in line


def raw_load(sampler, named_weights) -> None:
    """vLLM's own load, which keeps the prefix cache and checks nothing."""
    named = list(named_weights)
    sampler._engine.apply_model(lambda model: model.load_weights(iter(named)))


def test_two_turns_do_not_depend_on_order(sampler, trainer):
    forward = two_turns(sampler, range(24))
    sampler.load_weights(trainer.named_parameters())
    backward = two_turns(sampler, range(23, -1, -1))
    warm = two_turns(sampler, range(24))
    assert same_samples(forward, backward) and same_samples(forward, warm)


def test_logprobs_of_whole_trajectories_with_prefix_hits(sampler, trainer):
    played = two_turns(sampler, range(24))
    assert sum(played[i, 1][1].cached_tokens > 0 for i in range(24)) == 24
    assert worst_gap(trainer, played) <= TOLERANCE


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.7])
def test_logprobs_are_those_of_the_temperature(sampler, trainer, temperature):
    first = request(0, range(2, 90), temperature=temperature)
    other = request(1, range(5, 50))  # another temperature in the same batch
    assert gap_of(trainer, sampler, first, other) <= TOLERANCE


def test_stop_id_is_kept_and_nothing_else_stops(sampler, trainer):
    with torch.no_grad():
        trainer.model.norm.weight.zero_()  # the same probability for every id
    sampler.load_weights(trainer.named_parameters())
    done = sample(sampler, *(request(i, range(2, 20), max_new_tokens=60) for i in range(60)))
    assert 0 < sum(completion.finish == "stop" for completion in done.values()) < 60
    for completion in done.values():
        stopped = completion.sampled_ids[-1] == STOP
        assert stopped == (completion.finish == "stop") and STOP not in completion.sampled_ids[:-1]
        assert stopped or len(completion.sampled_ids) == 60


def test_max_context_is_respected(sampler):
    full, nearly = [5] * (CONTEXT - 1), [5] * (CONTEXT - 10)
    done = sample(sampler, request(0, full), request(1, nearly, max_new_tokens=100))
    assert len(done[0].sampled_ids) == 1 and len(done[1].sampled_ids) <= 10
    for prompt_ids in ((), [5] * CONTEXT):
        with pytest.raises(ValueError, match=f"must have 1 to {CONTEXT - 1}"):
            sampler.submit(request(2, prompt_ids))


def test_more_prompt_tokens_than_one_step_takes(sampler):
    """Seeded prompts that do not fit into one engine step wait for the next one."""
    prompts = {i: [(7 * i + j) % VOCAB for j in range(240)] for i in range(64)}
    requests = [request(i, prompt_ids, max_new_tokens=2) for i, prompt_ids in prompts.items()]
    assert sample(sampler, *requests).keys() == prompts.keys()


def test_abort_does_not_change_other_requests(sampler):
    check_abort(sampler)


def test_requests_in_flight_are_refused(sampler, trainer):
    sampler.submit(request(0, range(10, 60)))
    with pytest.raises(SyncError, match="1 requests are in flight"):
        sampler.load_weights(trainer.named_parameters())
    sampler.abort([0])


def test_steps_and_syncs(sampler, trainer, probe):
    for _ in range(3):
        assert sync_weights(trainer, sampler, probe, TOLERANCE) <= TOLERANCE / 5
        sampler.sleep()
        train_one_step(trainer)
    assert worst_gap(trainer, two_turns(sampler, range(24))) > TOLERANCE
    sync_weights(trainer, sampler, probe, TOLERANCE)
    assert worst_gap(trainer, two_turns(sampler, range(24))) <= TOLERANCE


def test_sampling_in_a_thread_while_training(sampler, trainer, probe):
    """As `train.overlap` does."""
    before = copy.deepcopy(trainer)
    with ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(two_turns, sampler, range(24))
        for _ in range(3):
            train_one_step(trainer)
        played = ahead.result()
    assert worst_gap(before, played) <= TOLERANCE < worst_gap(trainer, played)
    sync_weights(trainer, sampler, probe, TOLERANCE)
    assert worst_gap(trainer, two_turns(sampler, range(24))) <= TOLERANCE


def test_an_adapter_is_loaded_merged(sampler, trainer, probe):
    pytest.importorskip("peft")
    add_adapter(trainer, LoraConfig(r=4), seed=0)
    for _ in range(2):
        train_one_step(trainer, lr=1e-2)
    adapter = [p for p in trainer.parameters() if p.requires_grad]
    assert len(adapter) < len(list(trainer.parameters()))
    assert worst_gap(trainer, two_turns(sampler, range(24))) > TOLERANCE
    assert sync_weights(trainer, sampler, probe, TOLERANCE) <= TOLERANCE
    assert worst_gap(trainer, two_turns(sampler, range(24))) <= TOLERANCE


def test_ignored_weights_are_detected(sampler, trainer, probe):
    sync_weights(trainer, sampler, probe, TOLERANCE)
    old = copy.deepcopy(trainer)
    train_one_step(trainer)
    faulty = WithOtherLoad(sampler, lambda named: sampler.load_weights(old.named_parameters()))
    with pytest.raises(SyncError, match=r"differ from the trainer's by .*Likely"):
        sync_weights(trainer, faulty, probe, TOLERANCE)
    sync_weights(trainer, sampler, probe, TOLERANCE)


def test_a_missing_tensor_is_named(sampler, trainer, probe):
    for name, fused in [
        ("model.layers.2.self_attn.k_proj.weight", "qkv_proj"),
        ("model.layers.0.mlp.up_proj.weight", "gate_up_proj"),
        ("model.layers.1.self_attn.q_norm.weight", "q_norm"),
        ("model.embed_tokens.weight", "embed_tokens"),
    ]:
        with pytest.raises(SyncError, match=f"1 of its parameters: .*{fused}"):
            sync_weights(trainer, without(sampler, name), probe, TOLERANCE)
        sampler.load_weights(trainer.named_parameters())


def test_the_probe_detects_every_old_matrix(sampler, trainer, probe):
    """Also where the engine gets an old tensor under the right name."""
    old = {name: tensor.detach().clone() for name, tensor in trainer.named_parameters()}
    train_one_step(trainer)
    new = dict(trainer.named_parameters())
    for name in new:
        mixed = {**new, name: old[name]}
        sampler.load_weights(mixed.items())
        # the gains of norms change the log-probs least; rounding is below 5e-6 on a CPU
        least = TOLERANCE if "norm" not in name else TOLERANCE / 10
        assert compare(trainer, sampler, probe)[0] > least, name
    name = "model.layers.1.mlp.down_proj.weight"
    mixed = {**new, name: old[name]}
    faulty = WithOtherLoad(sampler, lambda named: sampler.load_weights(mixed.items()))
    with pytest.raises(SyncError, match="differ"):
        sync_weights(trainer, faulty, probe, 1e-4)


def test_a_stale_prefix_cache_is_detected(sampler, trainer, monkeypatch, probe):
    sync_weights(trainer, sampler, probe, TOLERANCE)
    # the probe hits the cache, so a stale one would be used
    assert min(c.cached_tokens for c in compare(trainer, sampler, probe)[1]) >= 32
    train_one_step(trainer)
    raw_load(sampler, trainer.named_parameters())
    assert compare(trainer, sampler, probe)[0] > 10 * TOLERANCE
    with monkeypatch.context() as patch:
        patch.setattr(sampler._engine, "reset_prefix_cache", lambda: True)
        with pytest.raises(SyncError, match="prefix cache"):
            sync_weights(trainer, sampler, probe, TOLERANCE)
    assert sync_weights(trainer, sampler, probe, TOLERANCE) <= TOLERANCE


def test_a_failed_reset_of_the_prefix_cache_is_an_error(sampler, trainer, monkeypatch, probe):
    monkeypatch.setattr(sampler._engine, "reset_prefix_cache", lambda: False)
    with pytest.raises(SyncError, match="prefix cache"):
        sync_weights(trainer, sampler, probe, TOLERANCE)


@pytest.mark.gpu
def test_sleep_frees_memory_and_weights_come_back(sampler, trainer, probe):
    sync_weights(trainer, sampler, probe, TOLERANCE)
    before = torch.cuda.mem_get_info()[0]
    sampler.sleep()
    assert sampler.asleep and torch.cuda.mem_get_info()[0] > before
    assert sync_weights(trainer, sampler, probe, TOLERANCE) <= TOLERANCE
    assert not sampler.asleep
