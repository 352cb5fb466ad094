"""Weight sync into the local sampler, and the faults that the probe must find.

The same faults against the real engine are in test_sampler_vllm.py.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from transformers import Qwen3ForCausalLM
from two_turns import VOCAB, tiny_qwen3

from turnfast.errors import SyncError
from turnfast.model import default_tolerance
from turnfast.sampler import Request
from turnfast.sampler.local import LocalSampler
from turnfast.sampler.scripted import ScriptedSampler
from turnfast.sampler.sync import (
    Probe,
    check_logprob_gap,
    compare,
    make_probe,
    sync_after_step,
    sync_weights,
    teacher_forced_logprobs,
)

CONTEXT, TOLERANCE = 256, 1e-4
PROBE = make_probe(VOCAB, CONTEXT)


@pytest.fixture(params=[PROBE, PROBE.short], ids=["long", "short"])
def probe(request) -> Probe:
    return request.param


@pytest.fixture
def trainer() -> Qwen3ForCausalLM:
    return tiny_qwen3(head_dim=16)


def own_sampler(model: torch.nn.Module) -> LocalSampler:
    return LocalSampler(model, stop_ids=(1,), num_slots=32, max_context=CONTEXT)


def train_one_step(model: Qwen3ForCausalLM, seed: int = 0, lr: float = 3e-4) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    ids = torch.randint(2, VOCAB, (4, 48), generator=torch.Generator().manual_seed(seed))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    model.zero_grad()


def warm(sampler: LocalSampler, probe: Probe) -> list[int]:
    """Ask for the probe's prompts once more, and say how much of them was not cached."""
    for i, prompt_ids in enumerate(probe.prompts):
        sampler.submit(
            Request(id=i, prompt_ids=prompt_ids, max_new_tokens=1, temperature=0.0, seed=0)
        )
    done = []
    while sampler.num_pending:
        done += sampler.step()
    return [len(probe.prompts[0]) - completion.cached_tokens for completion in done]


@pytest.mark.parametrize("shared", [True, False])
def test_steps_and_syncs(trainer, shared, probe):
    sampler = own_sampler(trainer if shared else copy.deepcopy(trainer))
    for seed in range(3):
        report = sync_weights(trainer, sampler, probe, TOLERANCE)
        assert report.gap <= 1e-5 and report.num_tokens >= len(probe.prompts) and report.time_s > 0
        assert warm(sampler, probe) == [1] * len(probe.prompts)
        train_one_step(trainer, seed)


def test_a_skipped_sync_is_caught(trainer, monkeypatch, probe):
    sampler = own_sampler(copy.deepcopy(trainer))
    sync_weights(trainer, sampler, probe, TOLERANCE)
    train_one_step(trainer)

    def drop_caches_only(named_weights):
        sampler._slots.forget()

    monkeypatch.setattr(sampler, "load_weights", drop_caches_only)
    with pytest.raises(SyncError, match=r"differ from the trainer's by .*Likely"):
        sync_weights(trainer, sampler, probe, TOLERANCE)


def test_a_shared_module_needs_no_probe_after_a_step(trainer):
    sampler = own_sampler(trainer)
    sync_weights(trainer, sampler, PROBE, TOLERANCE)
    assert warm(sampler, PROBE) == [1] * len(PROBE.prompts)
    for seed in range(2):
        train_one_step(trainer, seed)
        report = sync_after_step(trainer, sampler, PROBE, TOLERANCE, probed=True)
        assert report.num_tokens == 0 and report.gap == 0.0 < report.time_s
        gap, completions = compare(trainer, sampler, PROBE)
        assert gap <= 1e-5 and all(c.cached_tokens == 0 for c in completions)


def test_a_copy_is_probed_after_a_step_if_asked(trainer, monkeypatch):
    sampler = own_sampler(copy.deepcopy(trainer))
    sync_weights(trainer, sampler, PROBE, TOLERANCE)
    train_one_step(trainer)
    report = sync_after_step(trainer, sampler, PROBE, TOLERANCE, probed=True)
    assert report.num_tokens == 4 and report.gap <= 1e-5
    train_one_step(trainer, seed=1)
    monkeypatch.setattr(sampler, "load_weights", lambda named_weights: sampler._slots.forget())
    with pytest.raises(SyncError, match=r"differ from the trainer's by .*Likely"):
        sync_after_step(trainer, sampler, PROBE, TOLERANCE, probed=True)


def test_without_a_probe_the_weights_are_handed_over_all_the_same(trainer):
    sampler = own_sampler(copy.deepcopy(trainer))
    sync_weights(trainer, sampler, PROBE, TOLERANCE)
    train_one_step(trainer)
    report = sync_after_step(trainer, sampler, PROBE, TOLERANCE, probed=False)
    assert report.num_tokens == 0 and report.gap == 0.0
    gap, completions = compare(trainer, sampler, PROBE)
    assert gap <= 1e-5 and all(c.cached_tokens == 0 for c in completions)


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


def test_a_shared_module_with_requests_in_flight_is_refused(trainer):
    sampler = own_sampler(trainer)
    sampler.submit(Request(id=0, prompt_ids=(5, 6), max_new_tokens=3, temperature=1.0, seed=0))
    with pytest.raises(SyncError, match="1 requests are in flight"):
        sync_after_step(trainer, sampler, PROBE, TOLERANCE, probed=False)


def test_every_dropped_matrix_is_felt_by_the_probe(trainer, probe):
    """The probe alone, without the sampler's own check of completeness."""
    old = {name: tensor.detach().clone() for name, tensor in trainer.named_parameters()}
    train_one_step(trainer)
    served = copy.deepcopy(trainer)
    sampler = own_sampler(served)
    for name, tensor in served.named_parameters():
        new = tensor.detach().clone()
        tensor.data.copy_(old[name])
        sampler.load_weights(served.named_parameters())
        # rounding alone is below 2e-6; gains (norms) move the log-probs least
        assert compare(trainer, sampler, probe)[0] > (1e-5 if "norm" in name else TOLERANCE), name
        tensor.data.copy_(new)
    assert sync_weights(trainer, sampler, probe, TOLERANCE).gap < 2e-6


def test_a_dropped_tensor_is_refused_by_name(trainer, monkeypatch, probe):
    sampler = own_sampler(copy.deepcopy(trainer))
    take = sampler.load_weights
    dropped = "model.layers.2.self_attn.k_norm.weight"
    monkeypatch.setattr(
        sampler, "load_weights", lambda named: take((n, t) for n, t in named if n != dropped)
    )
    with pytest.raises(SyncError, match=r"layers\.2\.self_attn\.k_norm"):
        sync_weights(trainer, sampler, probe, TOLERANCE)


def test_a_stale_prefix_cache_is_caught(trainer, monkeypatch, probe):
    """The weights are shared, so all that can be stale are cached keys and values."""
    sampler = own_sampler(trainer)
    sync_weights(trainer, sampler, probe, TOLERANCE)
    assert warm(sampler, probe) == [1] * len(probe.prompts)
    train_one_step(trainer)
    monkeypatch.setattr(sampler._slots, "forget", lambda: None)
    gap, completions = compare(trainer, sampler, probe)
    assert gap > 10 * TOLERANCE
    assert {c.cached_tokens for c in completions} == {len(probe.prompts[0]) - 1}
    with pytest.raises(SyncError, match="prefix cache"):
        sync_weights(trainer, sampler, probe, TOLERANCE)


def test_a_stale_cache_is_caught_even_where_the_probe_was_evicted(trainer, monkeypatch, probe):
    sampler = own_sampler(trainer)
    sync_weights(trainer, sampler, probe, TOLERANCE)
    for i in range(64):  # twice the slots: nothing of the probe is left
        prompt_ids = tuple(range(2 + i, 40 + i))
        sampler.submit(
            Request(id=i, prompt_ids=prompt_ids, max_new_tokens=1, temperature=0.0, seed=0)
        )
    while sampler.num_pending:
        sampler.step()
    train_one_step(trainer)
    monkeypatch.setattr(sampler._slots, "forget", lambda: None)
    with pytest.raises(SyncError, match="prefix cache"):
        sync_weights(trainer, sampler, probe, TOLERANCE)


def test_values_that_are_not_numbers_are_caught(trainer, probe):
    sampler = own_sampler(trainer)
    with torch.no_grad():
        trainer.model.norm.weight[3] = float("nan")
    with pytest.raises(SyncError, match="by nan"):
        sync_weights(trainer, sampler, probe, TOLERANCE)


def test_requests_in_flight_are_refused(trainer, probe):
    sampler = own_sampler(trainer)
    sampler.submit(Request(id=0, prompt_ids=(5, 6), max_new_tokens=3, temperature=1.0, seed=0))
    with pytest.raises(SyncError, match="1 requests are in flight"):
        sync_weights(trainer, sampler, probe, TOLERANCE)


def test_a_sampler_without_the_weights_fails(trainer, probe):
    with pytest.raises(SyncError, match="differ"):
        sync_weights(trainer, ScriptedSampler(lambda prompt_ids: [1]), probe, TOLERANCE)


def test_sync_leaves_the_trainer_as_it_was(trainer, probe):
    trainer.train()
    before = {name: tensor.clone() for name, tensor in trainer.named_parameters()}
    state = torch.random.get_rng_state()
    sync_weights(trainer, own_sampler(copy.deepcopy(trainer)), probe, TOLERANCE)
    assert trainer.training and torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.named_parameters())


def test_teacher_forced_logprobs_are_the_plain_forward(trainer):
    ids = list(range(5, 45))
    ours = teacher_forced_logprobs(trainer, ids, start=30, temperature=0.7)
    with torch.no_grad():
        logprobs = torch.log_softmax(trainer(input_ids=torch.tensor([ids])).logits[0] / 0.7, -1)
    assert ours.shape == (10,)
    for n, position in enumerate(range(30, 40)):
        assert ours[n].item() == pytest.approx(
            logprobs[position - 1, ids[position]].item(), abs=1e-6
        )


def test_the_probe_touches_every_id_of_a_small_vocabulary():
    assert {i for prompt in PROBE.prompts for i in prompt} == set(range(VOCAB))
    assert len({len(prompt) for prompt in PROBE.prompts}) == 1
    assert make_probe(VOCAB, CONTEXT, seed=0) == PROBE != make_probe(VOCAB, CONTEXT, seed=1)
    assert sum(map(len, PROBE.short.prompts)) + 8 <= sum(map(len, PROBE.prompts)) / 7
    small = make_probe(10, 20)
    assert {len(prompt) for prompt in small.prompts} == {12}
    with pytest.raises(ValueError, match="no room"):
        make_probe(VOCAB, 8)


def test_tolerance_by_dtype():
    assert default_tolerance(torch.float32) == 1e-4
    assert default_tolerance(torch.float32) < default_tolerance(torch.float32, "cuda")
    assert default_tolerance(torch.float16) < default_tolerance(torch.bfloat16)
