"""Out of memory: the same step in smaller micro-batches, or a stop that names the setting."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch
from step_data import Keeping, make_groups, optimizer_of

from turnfast.config.schema import LossConfig
from turnfast.credit import assign_credits
from turnfast.errors import OutOfMemory
from turnfast.model import Policy, hidden_states
from turnfast.packing.pack import pack
from turnfast.update.budget import Budget, is_out_of_memory, split_batch
from turnfast.update.reference import with_reference
from turnfast.update.update import TrainingError, update


def packed_step(seed: int, *, share: bool = True):
    groups = make_groups(seed)
    return pack(groups, assign_credits(groups, "mt_grpo"), budget=4096, share_prefixes=share)


def many_rows():
    groups = [group for seed in range(9) for group in make_groups(seed)]
    return pack(groups, assign_credits(groups, "mt_grpo"), budget=1 << 20, share_prefixes=False)


def limit_tokens(policy: Policy, most: int, error: BaseException):
    """The model runs out of memory on every micro-batch of more tokens."""
    seen: list[int] = []

    def check(module, args, kwargs) -> None:
        seen.append(kwargs["input_ids"].shape[1])
        if seen[-1] > most:
            raise error

    handle = policy.model.base_model.register_forward_pre_hook(check, with_kwargs=True)
    return seen, handle


def largest_difference(a: Keeping, b: Keeping, step: int) -> float:
    pairs = zip(a.gradients[step], b.gradients[step], strict=True)
    return max(float((x - y).abs().max()) for x, y in pairs)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("budget", [1, 20, 33, 60, 4096])
def test_parts_have_the_hidden_states_of_the_whole(policy, share, budget):
    (batch,) = packed_step(1, share=share).batches
    hidden = hidden_states(policy, batch)[batch.rows_N]
    parts = split_batch(batch, budget)
    assert (len(parts) == 1) == (budget == 4096)
    assert all(len(part.tokens_T) <= max(budget, part.max_seqlen) for part in parts)
    again = torch.cat([hidden_states(policy, part)[part.rows_N] for part in parts])
    assert (again - hidden).abs().max() < 1e-5
    for name in ("targets_N", "turns_N", "weights_N", "sampler_logprobs_N"):
        whole = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(whole, getattr(batch, name)), name


def test_sequences_stay_whole_where_the_loss_needs_them(policy):
    (batch,) = packed_step(1).batches
    parts = split_batch(batch, 1, whole_sequences=True)
    owners = [set(part.sequences_K[part.turns_N.long()].tolist()) for part in parts]
    assert all(len(owner) == 1 for owner in owners)
    assert len(parts) == len(set.union(*owners))


@pytest.mark.parametrize("ratio", ["token", "turn", "sequence"])
@pytest.mark.parametrize("share", [True, False])
def test_the_step_is_the_same_in_smaller_batches(policy, ratio, share, caplog):
    """Two updates on the same data; memory runs out in the second one too."""
    packed, config = packed_step(2, share=share), LossConfig(ratio=ratio)
    start = {name: value.clone() for name, value in policy.model.state_dict().items()}
    plain = optimizer_of(policy)
    expected = update(policy, plain, packed.batches, config, num_updates=2)

    policy.model.load_state_dict(start)
    tokens = packed.num_tokens
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    cut = optimizer_of(policy)
    seen, handle = limit_tokens(policy, tokens * 3 // 5, error)
    with caplog.at_level("WARNING"):
        done = update(policy, cut, packed.batches, config, num_updates=2)
    handle.remove()
    assert seen[0] == tokens and max(seen[1:]) <= tokens * 3 // 5
    assert done.halvings == 1 and expected.halvings == 0
    assert f"{tokens} tokens" in caplog.text
    assert largest_difference(plain, cut, 0) <= 1e-6
    assert largest_difference(plain, cut, 1) <= 1e-6
    assert done.loss == pytest.approx(expected.loss, abs=1e-6)
    assert done.logprob_gap == pytest.approx(expected.logprob_gap, rel=1e-5)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("std::bad_alloc"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_every_kind_of_it_is_known(error):
    assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_what_never_fits_stops_the_run_and_changes_nothing(policy):
    packed, optimizer = packed_step(3), optimizer_of(policy)
    update(policy, optimizer, packed.batches, LossConfig())
    start = [p.detach().clone() for p in policy.model.parameters()]
    seen, handle = limit_tokens(policy, 0, MemoryError("no more"))
    with pytest.raises(OutOfMemory, match=r"train\.tokens_per_microbatch.*no more"):
        update(policy, optimizer, packed.batches, LossConfig())
    handle.remove()
    assert 2 <= len(seen) <= 4
    assert all(torch.equal(a, b) for a, b in zip(start, policy.model.parameters(), strict=True))
    assert all(p.grad is None for p in policy.model.parameters())
    assert optimizer.num_steps == 1
    update(policy, optimizer, packed.batches, LossConfig())
    assert optimizer.num_steps == 2


def test_what_did_not_fit_is_not_tried_again(policy):
    """The next step packs what fitted, but never less than a row; what it packs is cut to fit."""
    packed = many_rows()
    tokens = packed.num_tokens
    budget = Budget(4096, row=tokens)
    seen, handle = limit_tokens(policy, tokens // 3, MemoryError("no more"))
    done = update(policy, optimizer_of(policy), packed.batches, LossConfig(), budget=budget)
    assert done.halvings == budget.halvings == 2 and budget.tokens == tokens
    tried = len(seen)
    budget.begin_step()
    done = update(policy, optimizer_of(policy), packed.batches, LossConfig(), budget=budget)
    handle.remove()
    assert done.halvings == 0 and max(seen[tried:]) <= tokens // 3
    assert Budget(4096).tokens == 4096


@pytest.mark.parametrize("num_updates", [2, 3])
def test_a_step_is_halved_three_times_whatever_it_consists_of(policy, num_updates):
    """A reference pass and updates, each with half of the memory of the one before."""
    packed, optimizer, budget = many_rows(), optimizer_of(policy), Budget()

    def check(module, args, kwargs) -> None:
        halvings = 1 + optimizer.num_steps if torch.is_grad_enabled() else 0
        if kwargs["input_ids"].shape[1] > packed.num_tokens >> 1 + halvings:
            raise MemoryError("less and less")

    handle = policy.model.base_model.register_forward_pre_hook(check, with_kwargs=True)
    config = LossConfig(kl_coef=0.1)
    batches = with_reference(packed.batches, policy, config, temperature=1.0, budget=budget)
    assert budget.halvings == 1 and len(batches) >= 2
    if num_updates == 2:
        done = update(policy, optimizer, batches, config, num_updates=2, budget=budget)
        assert done.halvings == 3 and done.kl is not None
    else:
        with pytest.raises(OutOfMemory, match=r"3 halvings in this step"):
            update(policy, optimizer, batches, config, num_updates=3, budget=budget)
        assert optimizer.num_steps == 2
    handle.remove()
    budget.begin_step()
    assert budget.halvings == 0 and 0.9 <= 8 * budget.tokens / packed.num_tokens <= 1


def test_half_a_gradient_is_forgotten(policy):
    """Memory runs out on the second micro-batch, when the first has left its gradient."""
    groups = make_groups(4)
    packed = pack(groups, assign_credits(groups, "mt_grpo"), budget=48)
    batches = sorted(packed.batches, key=lambda batch: len(batch.tokens_T))
    assert len(batches[-1].tokens_T) > len(batches[0].tokens_T)
    start = {name: value.clone() for name, value in policy.model.state_dict().items()}
    plain = optimizer_of(policy)
    update(policy, plain, batches, LossConfig())
    policy.model.load_state_dict(start)
    cut = optimizer_of(policy)
    _, handle = limit_tokens(policy, len(batches[-1].tokens_T) - 1, MemoryError())
    done = update(policy, cut, batches, LossConfig())
    handle.remove()
    assert done.halvings >= 1
    assert largest_difference(plain, cut, 0) <= 1e-6


def test_other_errors_are_not_taken_for_it(policy):
    packed = packed_step(5)
    broken = [replace(batch, rows_N=batch.rows_N + 10**6) for batch in packed.batches]
    with pytest.raises((ValueError, IndexError, RuntimeError)) as caught:
        update(policy, optimizer_of(policy), broken, LossConfig())
    assert not isinstance(caught.value, OutOfMemory)
    assert isinstance(caught.value, TrainingError)


CHILD = """
    import json, re, resource, sys
    from pathlib import Path
    import torch
    from turnfast.config import LossConfig, ModelConfig, OptimConfig
    from turnfast.credit import assign_credits
    from turnfast.loss import update
    from turnfast.model import load_policy
    from turnfast.optim import Optimizer
    from turnfast.packing import batch_of
    from turnfast.rows import rows_of
    from turnfast.types import Turn

    torch.set_num_threads(1)
    policy = load_policy(ModelConfig(), Path(sys.argv[1]), torch.device("cpu"))

    def batch(rows, length):
        draw = torch.Generator().manual_seed(0)
        made = []
        for index in range(rows):
            ids = torch.randint(3, 280, (length,), generator=draw).tolist()
            made.append(
                Turn(
                    prompt_ids=tuple(ids[:-8]), sampled_ids=tuple(ids[-8:]), logprobs=(-5.0,) * 8,
                    text="", finish="stop",
                )
            )
        found = rows_of([[turn] for turn in made], [1.0 - index % 3 for index in range(rows)])
        return batch_of(found, [1 / (8 * rows)] * rows, "cpu", share_prefixes=True)

    def held(name):
        text = Path("/proc/self/status").read_text()
        return int(re.search(name + r":\\s+(\\d+)", text)[1]) * 1024

    class Kept(Optimizer):
        def step(self):
            self.sum = sum(float(p.grad.double().abs().sum()) for p in self._parameters)
            return super().step()

    optimizer = Kept(policy.model.parameters(), OptimConfig(warmup_steps=0))
    update(policy, optimizer, [batch(2, 32)], LossConfig())  # libraries, state, thread pools
    large, before = batch(48, 256), held("VmSize")
    if sys.argv[2] != "0":
        most = before + int(sys.argv[2])
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    done = update(policy, optimizer, [large], LossConfig())
    print(json.dumps({"halvings": done.halvings, "gradient": optimizer.sum, "loss": done.loss,
                      "grown": held("VmPeak") - before}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and an address-space limit")
def test_a_real_limit_of_the_allocator(tiny_folder):
    def child(limit: int) -> dict:
        command = [sys.executable, "-c", textwrap.dedent(CHILD), str(tiny_folder), str(limit)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    free = child(0)
    assert free["halvings"] == 0
    tight = child(int(0.6 * free["grown"]))
    assert 1 <= tight["halvings"] <= 3
    assert tight["gradient"] == pytest.approx(free["gradient"], rel=1e-4)
    assert tight["loss"] == pytest.approx(free["loss"], abs=1e-6)
