"""The local sampler against plain Hugging Face forwards."""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM
from two_turns import (
    SHAPE,
    check_abort,
    gap_of,
    request,
    same_samples,
    sample,
    tiny_qwen3,
    two_turns,
    worst_gap,
)

from turnfast.errors import ConfigError, SyncError
from turnfast.sampler.local import LocalSampler, draw


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny_qwen3()


def sampler_of(model: torch.nn.Module, num_slots: int = 64, stop_ids=(1,), **options):
    options = {"max_context": 256, **options}
    return LocalSampler(model, stop_ids=stop_ids, num_slots=num_slots, **options)


def test_two_turns_do_not_depend_on_order_or_on_the_number_of_slots(model):
    forward = two_turns(sampler_of(model), range(24))
    backward = two_turns(sampler_of(model), range(23, -1, -1))
    crowded = two_turns(sampler_of(model, num_slots=5), range(23, -1, -1))
    assert same_samples(forward, backward) and same_samples(forward, crowded)
    assert {completion.finish for _, completion in forward.values()} >= {"length"}


@pytest.mark.parametrize("num_slots", [64, 5])
def test_logprobs_of_whole_trajectories_with_prefix_hits(model, num_slots):
    played = two_turns(sampler_of(model, num_slots=num_slots), range(24))
    cached = sum(completion.cached_tokens for _, completion in played.values())
    assert cached > 24 * 20
    if num_slots == 64:  # all of the first turn is cached but its last sample
        assert all(
            second.cached_tokens >= len(played[i, 0][0].prompt_ids) + len(first.sampled_ids) - 1
            for i in range(24)
            for first, second in [(played[i, 0][1], played[i, 1][1])]
        )
    assert worst_gap(model, played) <= 1e-5


def test_a_warm_cache_does_not_change_the_samples(model):
    sampler = sampler_of(model)
    cold, warm = two_turns(sampler, range(24)), two_turns(sampler, range(24))
    assert same_samples(cold, warm)
    assert worst_gap(model, warm) <= 1e-5


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_logprobs_are_those_of_the_temperature(model, temperature):
    first = request(0, range(2, 40), temperature=temperature)
    assert gap_of(model, sampler_of(model), first) <= 1e-5


def test_greedy_takes_the_largest_and_reports_temperature_one(model):
    first = request(0, range(2, 40), temperature=0.0)
    completion = sample(sampler_of(model), first)[0]
    assert worst_gap(model, {0: (first, completion)}) <= 1e-5
    ids = torch.tensor([first.prompt_ids + completion.sampled_ids])
    with torch.no_grad():
        best = model(input_ids=ids).logits[0].argmax(-1)
    assert tuple(best[len(first.prompt_ids) - 1 : -1].tolist()) == completion.sampled_ids


def test_stop_id_is_kept_and_length_is_respected(model):
    prompt = request(0, range(2, 40), max_new_tokens=20)
    free = sample(sampler_of(model, stop_ids=()), prompt)[0]
    assert free.finish == "length" and len(free.sampled_ids) == 20
    stop = free.sampled_ids[7]
    stopped = sample(sampler_of(model, stop_ids=(stop,)), prompt)[0]
    where = free.sampled_ids.index(stop) + 1
    assert stopped.finish == "stop" and stopped.sampled_ids == free.sampled_ids[:where]


def test_max_context_is_respected(model):
    sampler = sampler_of(model, stop_ids=(), max_context=32, num_slots=2)
    done = sample(
        sampler,
        request(0, range(2, 33), max_new_tokens=10),
        request(1, range(2, 12), max_new_tokens=100),
    )
    assert len(done[0].sampled_ids) == 1 and len(done[1].sampled_ids) == 22
    assert done[0].finish == done[1].finish == "length"
    for prompt_ids in ((), range(2, 34)):
        with pytest.raises(ValueError, match="must have 1 to 31"):
            sampler.submit(request(2, prompt_ids))


def test_abort_does_not_change_other_requests(model):
    check_abort(sampler_of(model, num_slots=2))


def test_every_step_advances_every_running_request(model):
    sampler = sampler_of(model, stop_ids=(), num_slots=8)
    for i in range(8):
        sampler.submit(request(i, range(2, 10 + 10 * i), max_new_tokens=5))
    done = [sampler.step() for _ in range(5)]
    assert [len(step) for step in done] == [0, 0, 0, 0, 8] and sampler.num_pending == 0


def test_a_step_restores_the_attention_of_the_model(model):
    model.train()
    before = model.config._attn_implementation
    sample(sampler_of(model), request(0, range(2, 40)))
    assert not any(module.training for module in model.modules())
    assert model.config._attn_implementation == before
    model(input_ids=torch.arange(2, 30)[None]).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(
            lambda: LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_key_value_heads": 4})), id="llama"
        ),
        pytest.param(
            lambda: tiny_qwen3(
                use_sliding_window=True,
                sliding_window=24,
                layer_types=["full_attention", "sliding_attention", "sliding_attention"],
            ),
            id="sliding-window",
        ),
        pytest.param(lambda: tiny_qwen3(num_hidden_layers=1), id="one-layer"),
    ],
)
def test_other_architectures(other):
    model = other()
    assert worst_gap(model, two_turns(sampler_of(model), range(24))) <= 1e-5


def test_bfloat16_is_close_to_the_forward():
    model = tiny_qwen3().to(torch.bfloat16)
    assert worst_gap(model, two_turns(sampler_of(model), range(24))) < 0.2


def test_softcapped_attention_is_refused():
    model = Gemma2ForCausalLM(Gemma2Config(**SHAPE))
    sampler = sampler_of(model)
    sampler.submit(request(0, range(2, 40)))
    with pytest.raises(ConfigError, match="softcap"):
        sampler.step()


def test_weights_of_another_module_are_loaded_and_the_cache_is_dropped():
    trainer, sampler = tiny_qwen3(seed=1), sampler_of(tiny_qwen3(seed=2))
    two_turns(sampler, range(24))
    sampler.load_weights(trainer.named_parameters())
    assert worst_gap(trainer, two_turns(sampler, range(24))) <= 1e-5
    sampler.submit(request(0, range(2, 40)))
    with pytest.raises(SyncError, match="1 requests are in flight"):
        sampler.load_weights(trainer.named_parameters())


def test_an_incomplete_set_of_tensors_is_refused():
    trainer, sampler = tiny_qwen3(seed=1), sampler_of(tiny_qwen3(seed=2))
    missing = "model.layers.1.mlp.up_proj.weight"
    named = [(name, tensor) for name, tensor in trainer.named_parameters() if name != missing]
    with pytest.raises(SyncError, match=r"layers\.1\.mlp\.up_proj"):
        sampler.load_weights(named)
    with pytest.raises(SyncError, match=r"no parameter 'model\.surplus'"):
        sampler.load_weights([("model.surplus", torch.zeros(1))])


def test_draw_follows_the_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, float("-inf")])
    count = 20000
    generators = [torch.Generator().manual_seed(i) for i in range(count)]
    ids, logprobs = draw(logits.repeat(count, 1), [1.3] * count, generators)
    p = torch.softmax(logits / 1.3, -1)
    observed = torch.bincount(torch.tensor(ids), minlength=5) / count
    # five standard deviations of a frequency
    assert ((observed - p).abs() <= 5 * (p * (1 - p) / count).sqrt()).all()
    torch.testing.assert_close(torch.tensor(logprobs), p.log()[ids])


def test_rounding_noise_does_not_change_draws():
    """Noise a hundred times that of another batch changes at most 2 of 20,000 draws."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20000, 600, generator=generator)
    noisy = logits + 1e-5 * torch.randn(20000, 600, generator=generator)
    seeds = range(20000)
    first, _ = draw(logits, [1.0] * 20000, [torch.Generator().manual_seed(i) for i in seeds])
    second, _ = draw(noisy, [1.0] * 20000, [torch.Generator().manual_seed(i) for i in seeds])
    assert sum(a != b for a, b in zip(first, second, strict=True)) <= 2
