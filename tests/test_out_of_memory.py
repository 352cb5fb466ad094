"""Out-of-memory errors end a step with a text that names the setting to change."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from step_data import make_groups, optimizer_of

from turnfast.config.schema import LossConfig
from turnfast.credit import assign_credits
from turnfast.errors import OutOfMemory
from turnfast.packing.pack import pack
from turnfast.update.learner import Learner
from turnfast.update.memory import explain_out_of_memory, smaller_microbatches
from turnfast.update.update import update


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
def test_errors_of_all_allocators_are_recognised(error):
    reason = str(error) or "MemoryError"
    with pytest.raises(OutOfMemory) as caught, explain_out_of_memory(OutOfMemory, "use less"):
        raise error
    assert str(caught.value) == f"use less ({reason})"


def test_other_errors_pass():
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError) as caught, explain_out_of_memory(OutOfMemory, "use less"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    ("tokens", "least", "checkpointing", "text"),
    [
        (4096, 1024, False, "lower x from 4096 to 2048; if that is not enough, set model.checkpo"),
        (4096, 1024, True, "lower x from 4096 to 2048"),
        (1500, 1024, True, "lower x from 1500 to 1024"),
        (1024, 1024, False, "set model.checkpointing = true"),
        (1024, 1024, True, "x = 1024 cannot be lowered; train an adapter with model.lora.r"),
    ],
)
def test_the_advice_stays_within_the_limits_of_the_recipe(tokens, least, checkpointing, text):
    advice = smaller_microbatches("x", tokens, least=least, checkpointing=checkpointing)
    assert advice.startswith(f"out of memory in a micro-batch: {text}")


def test_out_of_memory_changes_nothing(policy):
    groups = make_groups(4)
    batches = pack(groups, assign_credits(groups, "mt_grpo"), budget=48).batches
    optimizer = optimizer_of(policy)
    learner = Learner(policy=policy, optimizer=optimizer)
    update(learner, batches, LossConfig())
    start = [p.detach().clone() for p in policy.model.parameters()]
    calls = 0

    def fail_on_second_micro_batch(*_) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise MemoryError("no more")

    handle = policy.model.base_model.register_forward_pre_hook(fail_on_second_micro_batch)
    with pytest.raises(OutOfMemory, match=r"^use less \(no more\)$"):
        update(learner, batches, LossConfig(), memory_advice="use less")
    handle.remove()
    assert calls == 2 and optimizer.num_steps == 1
    assert all(map(torch.equal, start, policy.model.parameters()))
    assert all(p.grad is None for p in policy.model.parameters())


CHILD = """
    import resource, sys
    from pathlib import Path
    import torch
    from turnfast.config.schema import LossConfig, ModelConfig, OptimConfig
    from turnfast.errors import OutOfMemory
    from turnfast.model import load_policy
    from turnfast.packing.pack import batch_of
    from turnfast.packing.rows import rows_of
    from turnfast.types import Turn
    from turnfast.update.learner import Learner
    from turnfast.update.optimizer import Optimizer
    from turnfast.update.update import update

    torch.set_num_threads(1)
    policy = load_policy(ModelConfig(), Path(sys.argv[1]), torch.device("cpu"))
    optimizer = Optimizer(policy.model.parameters(), OptimConfig(warmup_steps=0))
    learner = Learner(policy=policy, optimizer=optimizer)

    def batch(num_rows, length):
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(3, 280, (num_rows, length), generator=draw).tolist()
        turns = [
            Turn(prompt_ids=tuple(row[:-8]), sampled_ids=tuple(row[-8:]), logprobs=(-5.0,) * 8,
                 text="", finish="stop")
            for row in ids
        ]
        rows = rows_of([[turn] for turn in turns], [1.0 - i % 3 for i in range(num_rows)])
        return batch_of(rows, [1 / (8 * num_rows)] * num_rows, "cpu", share_prefixes=True)

    def step(batch):
        return update(learner, [batch], LossConfig(), memory_advice="use less").loss

    step(batch(2, 32))  # load libraries, start thread pools
    large = batch(48, 256)
    unlimited = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + 24 * 2**20, unlimited[1]))
    try:
        step(large)
    except OutOfMemory as error:
        print(error)
    small = step(batch(2, 32))  # the memory of the failed step is free again
    resource.setrlimit(resource.RLIMIT_AS, unlimited)
    step(large)
    print(optimizer.num_steps)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and an address-space limit")
def test_a_real_limit_of_the_allocator(tiny_folder):
    command = [sys.executable, "-c", textwrap.dedent(CHILD), str(tiny_folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    text, steps = done.stdout.splitlines()
    assert text.startswith("use less (") and "allocate memory" in text
    assert steps == "3"
