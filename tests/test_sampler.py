"""The choice of a sampler, the scripted sampler, and the slot table of the local one."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3Config, Qwen3ForCausalLM
from two_turns import request, sample

from turnfast.config.schema import SamplerConfig
from turnfast.errors import ConfigError
from turnfast.model import Policy
from turnfast.sampler import choose_backend
from turnfast.sampler.open import open_sampler
from turnfast.sampler.scripted import ScriptedSampler, shuffled
from turnfast.sampler.slots import MIN_COPY, SlotTable


def test_importing_the_package_loads_neither_torch_nor_vllm():
    code = (
        "import sys, turnfast.sampler, turnfast.sampler.scripted\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'vllm', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_missing_vllm_is_reported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert choose_backend(SamplerConfig(backend="auto")) == "local"
    with pytest.raises(ConfigError, match=r"sampler\.backend: 'vllm'.*turnfast\[vllm\]"):
        choose_backend(SamplerConfig(backend="vllm"))


def test_vllm_is_refused_with_the_triton_interpreter(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_backend(SamplerConfig(backend="auto")) == "local"
    with pytest.raises(ConfigError, match="TRITON_INTERPRET"):
        choose_backend(SamplerConfig(backend="vllm"))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert choose_backend(SamplerConfig(backend="auto")) == "vllm"


def open_local(max_context: int, *, device: str = "cpu", **fields):
    shape = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = Qwen3Config(
        vocab_size=50, num_key_value_heads=1, max_position_embeddings=10**12, **shape
    )
    policy = Policy(
        model=Qwen3ForCausalLM(config),
        tokenizer=None,
        folder=Path("unused"),
        device=torch.device(device),
        attention="sdpa",
    )
    config = SamplerConfig(**{"backend": "local", **fields})
    return open_sampler(config, policy, stop_ids=(1,), max_context=max_context)


def test_the_local_sampler_is_opened_on_request():
    sampler = open_local(32)
    assert len(sample(sampler, request(0, (5, 6), max_new_tokens=2))[0].sampled_ids) <= 2
    sampler.close()


def test_a_gpu_without_vllm_warns_and_must_free_its_cache(monkeypatch, caplog):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    open_local(32, backend="auto")
    open_local(32, device="cuda")
    assert not caplog.records
    open_local(32, device="cuda", backend="auto")
    assert "sampler.backend: vLLM cannot be used" in caplog.text and "'.[vllm]'" in caplog.text
    with pytest.raises(ConfigError, match=r"sampler\.sleep: false needs vLLM"):
        open_local(32, device="cuda", backend="auto", sleep=False)


def test_a_context_that_no_memory_holds_is_refused():
    with pytest.raises(ConfigError, match=r"rollout\.max_context: .* 1000000000000 tokens"):
        open_local(10**12)


@pytest.mark.parametrize(
    ("pick", "order"), [(lambda waiting: waiting[-1:], [2, 1, 0]), (shuffled(3), None)]
)
def test_scripted_completes_in_the_chosen_order(pick, order):
    sampler = ScriptedSampler(lambda request: [request.prompt_ids[-1] + 1, 2], pick=pick)
    done = sample(sampler, *(request(i, (5, 10 + i)) for i in range(3)))
    for completion in done.values():
        assert completion.sampled_ids == (11 + completion.id, 2)
        assert completion.finish == "stop" and len(completion.logprobs) == 2
    assert sorted(done) == [0, 1, 2] and order in (None, list(done))


def test_scripted_cuts_and_aborts():
    sampler = ScriptedSampler(lambda request: range(4))
    for i, limit in enumerate((3, 4, 5)):
        sampler.submit(request(i, (1,), max_new_tokens=limit))
    sampler.abort([2, 7])
    cut, complete = sampler.step()
    assert (cut.id, cut.sampled_ids, cut.finish) == (0, (0, 1, 2), "length")
    assert (complete.id, complete.sampled_ids, complete.finish) == (1, (0, 1, 2, 3), "stop")


class TestSlotTable:
    def test_the_next_turn_continues_in_its_slot(self):
        table = SlotTable(4, 64)
        first = table.place(range(30))
        assert first is not None and (first.slot, first.cached) == (0, 0)
        table.append(0, 99)
        table.release(0)
        table.unpin()
        second = table.place([*range(30), 99, 7, 8])
        assert second is not None and (second.slot, second.cached, second.source) == (0, 31, None)

    def test_rollouts_of_one_prompt_copy_from_the_first(self):
        table = SlotTable(4, 64)
        prompt = list(range(MIN_COPY + 4))
        placements = [table.place(prompt) for _ in range(4)]
        assert [p.source for p in placements if p] == [None, 0, 0, 0]
        assert [p.cached for p in placements if p] == [0, *[MIN_COPY + 3] * 3]
        assert table.place(prompt) is None

    def test_nothing_is_reused_after_clear(self):
        table = SlotTable(2, 64)
        table.place(range(40))
        table.release(0)
        table.clear()
        again = table.place(range(40))
        assert again is not None and again.cached == 0 and again.source is None

    @settings(max_examples=200, deadline=None)
    @given(st.data())
    def test_cached_tokens_are_in_the_cache(self, data: st.DataObject):
        """Against a model of the cache, which is written and copied as in the forward."""
        num_slots, capacity = data.draw(st.integers(1, 5)), 48
        table, cache = SlotTable(num_slots, capacity), -np.ones((num_slots, capacity), dtype=int)
        busy: set[int] = set()
        history: list[list[int]] = [[0]]
        for _ in range(data.draw(st.integers(1, 6))):
            writes, copies = [], []
            for slot in sorted(busy):
                if table.length(slot) < capacity:
                    token = data.draw(st.integers(0, 2))
                    writes.append((slot, table.length(slot), [token]))
                    table.append(slot, token)
            for _ in range(data.draw(st.integers(0, 4))):
                stem = data.draw(st.sampled_from(history))
                tail = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=20))
                prompt = (stem + tail)[: capacity - 1]
                placement = table.place(prompt)
                if placement is None:
                    break
                assert placement.slot not in busy and placement.cached < len(prompt)
                busy.add(placement.slot)
                history.append(prompt)
                writes.append((placement.slot, placement.cached, prompt[placement.cached :]))
                if placement.source is not None:
                    copies.append((placement.source, placement.slot, placement.cached))
            for slot, start, tokens in writes:
                cache[slot, start : start + len(tokens)] = tokens
            for source, target, length in copies:
                cache[target, :length] = cache[source, :length]
            table.unpin()
            for slot in busy:
                np.testing.assert_array_equal(cache[slot, : table.length(slot)], table.tokens(slot))
            for slot in data.draw(st.sets(st.sampled_from(sorted(busy)))) if busy else ():
                busy.remove(slot)
                table.release(slot)
