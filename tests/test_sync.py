"""Weight sync into the local sampler, and the faults that the probe must detect.

test_sampler_vllm.py tests the same faults with the real engine.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from transformers import Qwen3ForCausalLM
from two_turns import (
    VOCAB,
    WithOtherLoad,
    forward_logprobs,
    request,
    sample,
    tiny_qwen3,
    train_one_step,
    without,
)

from turnfast.errors import ConfigError, SyncError
from turnfast.model import default_tolerance
from turnfast.sampler.local import LocalSampler
from turnfast.sampler.scripted import ScriptedSampler
from turnfast.sampler.sync import (
    Probe,
    check_logprob_gap,
    compare,
    make_probe,
    sync_after_step,
    sync_weights,
)

CONTEXT, TOLERANCE = 256, 1e-4
PROBE = make_probe(VOCAB, CONTEXT)


@pytest.fixture(params=[PROBE, PROBE.short], ids=["long", "short"])
def probe(request) -> Probe:
    return request.param


@pytest.fixture
def trainer() -> Qwen3ForCausalLM:
    return tiny_qwen3()


def sampler_of(model: torch.nn.Module) -> LocalSampler:
    return LocalSampler(model, stop_ids=(1,), num_slots=32, max_context=CONTEXT)


def uncached_tokens(sampler: LocalSampler, probe: Probe) -> list[int]:
    """Sample after the probe's prompts; how many of their tokens were not cached."""
    requests = [request(i, ids, max_new_tokens=1) for i, ids in enumerate(probe.prompts)]
    done = sample(sampler, *requests).values()
    return [len(probe.prompts[0]) - completion.cached_tokens for completion in done]


both_syncs = pytest.mark.parametrize(
    "sync", [sync_weights, partial(sync_after_step, probed=True)], ids=["first", "after-step"]
)


@pytest.mark.parametrize("shared", [True, False])
def test_steps_and_syncs(trainer, shared, probe):
    sampler = sampler_of(trainer if shared else copy.deepcopy(trainer))
    for seed in range(3):
        assert sync_weights(trainer, sampler, probe, TOLERANCE) <= 1e-5
        assert uncached_tokens(sampler, probe) == [1] * len(probe.prompts)
        train_one_step(trainer, seed)


@both_syncs
def test_ignored_weights_are_detected(trainer, sync):
    old = copy.deepcopy(trainer)
    sampler = sampler_of(old)
    sync_weights(trainer, sampler, PROBE, TOLERANCE)
    train_one_step(trainer)
    # loading its own weights only drops the caches
    faulty = WithOtherLoad(sampler, lambda named: sampler.load_weights(old.named_parameters()))
    with pytest.raises(SyncError, match=r"differ from the trainer's by .*Likely"):
        sync(trainer, faulty, PROBE, TOLERANCE)


def test_a_shared_module_is_not_probed_after_a_step(trainer):
    sampler = sampler_of(trainer)
    sync_weights(trainer, sampler, PROBE, TOLERANCE)
    assert uncached_tokens(sampler, PROBE) == [1] * len(PROBE.prompts)
    for seed in range(2):
        train_one_step(trainer, seed)
        assert sync_after_step(trainer, sampler, PROBE, TOLERANCE, probed=True) == 0.0
        gap, completions = compare(trainer, sampler, PROBE)
        assert gap <= 1e-5 and all(c.cached_tokens == 0 for c in completions)


@pytest.mark.parametrize("probed", [True, False])
def test_a_copy_gets_the_weights_after_a_step(trainer, probed):
    sampler = sampler_of(copy.deepcopy(trainer))
    sync_weights(trainer, sampler, PROBE, TOLERANCE)
    train_one_step(trainer)
    assert sync_after_step(trainer, sampler, PROBE, TOLERANCE, probed=probed) <= 1e-5
    gap, completions = compare(trainer, sampler, PROBE)
    assert gap <= 1e-5
    # the cache has the prompts of a short probe, or nothing
    assert sum(c.cached_tokens > 0 for c in completions) == (2 if probed else 0)


@pytest.mark.parametrize(
    ("dtype", "mean", "largest", "refused"),
    [
        (torch.float32, 1e-7, 9e-5, False),
        (torch.float32, 1e-5, 9e-4, False),
        (torch.float32, 1e-7, 2e-3, True),
        (torch.float32, 3e-5, 9e-5, True),
        (torch.float32, 0.0, float("nan"), True),
        (torch.bfloat16, 0.01, 3.0, False),
        (torch.bfloat16, 0.06, 3.0, True),
        (torch.bfloat16, float("nan"), float("nan"), True),
    ],
)
def test_tokens_of_other_weights_are_refused(dtype, mean, largest, refused):
    tolerance = default_tolerance(dtype)
    with pytest.raises(SyncError, match="of this step ") if refused else nullcontext():
        check_logprob_gap(mean, largest, tolerance=tolerance, dtype=dtype)


def test_the_probe_detects_every_old_matrix(trainer, probe):
    """Also without the sampler's own check for missing tensors."""
    old = {name: tensor.detach().clone() for name, tensor in trainer.named_parameters()}
    train_one_step(trainer)
    copied = copy.deepcopy(trainer)
    sampler = sampler_of(copied)
    for name, tensor in copied.named_parameters():
        new = tensor.detach().clone()
        tensor.data.copy_(old[name])
        sampler.load_weights(copied.named_parameters())
        # rounding alone is below 2e-6; the gains of norms change the log-probs least
        assert compare(trainer, sampler, probe)[0] > (1e-5 if "norm" in name else TOLERANCE), name
        tensor.data.copy_(new)
    assert sync_weights(trainer, sampler, probe, TOLERANCE) < 2e-6


def test_a_missing_tensor_is_named(trainer, probe):
    name = "model.layers.2.self_attn.k_norm.weight"
    sampler = without(sampler_of(copy.deepcopy(trainer)), name)
    with pytest.raises(SyncError, match=r"layers\.2\.self_attn\.k_norm"):
        sync_weights(trainer, sampler, probe, TOLERANCE)


@pytest.mark.parametrize("evicted", [False, True])
def test_a_stale_prefix_cache_is_detected(trainer, evicted, probe):
    """The weights are shared, so only cached keys and values can be stale."""
    sampler = sampler_of(trainer)
    sync_weights(trainer, sampler, probe, TOLERANCE)
    assert uncached_tokens(sampler, probe) == [1] * len(probe.prompts)
    if evicted:  # by twice as many requests as slots
        sample(sampler, *(request(i, range(2 + i, 40 + i), max_new_tokens=1) for i in range(64)))
    train_one_step(trainer)
    if not evicted:
        gap, completions = compare(trainer, sampler, probe)
        assert gap > 10 * TOLERANCE
        assert {c.cached_tokens for c in completions} == {len(probe.prompts[0]) - 1}
    faulty = WithOtherLoad(sampler, lambda named: None)
    with pytest.raises(SyncError, match="prefix cache"):
        sync_weights(trainer, faulty, probe, TOLERANCE)


def test_nan_weights_are_detected(trainer, probe):
    sampler = sampler_of(trainer)
    with torch.no_grad():
        trainer.model.norm.weight[3] = float("nan")
    with pytest.raises(SyncError, match="by nan"):
        sync_weights(trainer, sampler, probe, TOLERANCE)


@both_syncs
def test_requests_in_flight_are_refused(trainer, sync):
    sampler = sampler_of(trainer)
    sampler.submit(request(0, (5, 6)))
    with pytest.raises(SyncError, match="1 requests are in flight"):
        sync(trainer, sampler, PROBE, TOLERANCE)


def test_a_sampler_without_the_weights_is_detected(trainer, probe):
    with pytest.raises(SyncError, match="differ"):
        sync_weights(trainer, ScriptedSampler(lambda request: [1]), probe, TOLERANCE)


def test_sync_does_not_change_the_trainer(trainer, probe):
    trainer.train()
    before = {name: tensor.clone() for name, tensor in trainer.named_parameters()}
    state = torch.random.get_rng_state()
    sync_weights(trainer, sampler_of(copy.deepcopy(trainer)), probe, TOLERANCE)
    assert trainer.training and torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.named_parameters())


def test_the_gap_is_to_the_plain_forward(trainer):
    """The sampler shifts one log-prob of one row by 0.25."""
    rows = {prompt_ids: i for i, prompt_ids in enumerate(PROBE.prompts)}
    replies = [(7 + i, 9 + i, 1)[: 1 + i % 3] for i in range(len(rows))]

    def score(request, sampled_ids):
        row = rows[request.prompt_ids]
        logprobs = forward_logprobs(
            trainer, request.prompt_ids + sampled_ids, len(request.prompt_ids)
        ).tolist()
        return [x + 0.25 * (row == 5 and k == 2) for k, x in enumerate(logprobs)]

    sampler = ScriptedSampler(lambda request: replies[rows[request.prompt_ids]], score=score)
    gap, completions = compare(trainer, sampler, PROBE)
    assert gap == pytest.approx(0.25, abs=1e-5)
    assert [completion.sampled_ids for completion in completions] == replies


def test_the_probe_has_every_id_of_a_small_vocabulary():
    assert {i for prompt in PROBE.prompts for i in prompt} == set(range(VOCAB))
    assert len({len(prompt) for prompt in PROBE.prompts}) == 1
    assert make_probe(VOCAB, CONTEXT) == PROBE
    assert sum(map(len, PROBE.short.prompts)) + 8 <= sum(map(len, PROBE.prompts)) / 7
    small = make_probe(10, 20)
    assert {len(prompt) for prompt in small.prompts} == {12}
    with pytest.raises(ConfigError, match=r"rollout\.max_context: 8 tokens are too few"):
        make_probe(VOCAB, 8)


def test_tolerance_by_dtype():
    assert default_tolerance(torch.float32) == 1e-4
    assert default_tolerance(torch.float32) < default_tolerance(torch.float32, "cuda")
    assert default_tolerance(torch.float16) < default_tolerance(torch.bfloat16)
