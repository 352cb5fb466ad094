"""Data parallelism: the ranks' shares add up to the step of one rank, and a run of two to its run.

Ranks are threads here where that is enough, and processes where a whole run is started.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import by_hand
import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from step_data import RecordingOptimizer, make_groups
from training_runs import recipe, training_lines

from turnfast.config.recipe import to_toml
from turnfast.config.schema import LossConfig, ModelConfig, OptimConfig
from turnfast.credit import assign_credits
from turnfast.errors import ConfigError, RankError, SyncError, TrainingError
from turnfast.model import Policy, load_policy
from turnfast.packing.options import PackOptions
from turnfast.packing.pack import Packed, pack, pack_step, trainable_rows
from turnfast.packing.rows import join_ranks
from turnfast.parallel.ranks import ALONE, Ranks, checksum, open_ranks
from turnfast.rollout.prompts import open_queue
from turnfast.run import open_run
from turnfast.rundir.directory import read_metrics
from turnfast.train import train
from turnfast.types import Group, Task, Turn
from turnfast.update.learner import Learner
from turnfast.update.optimizer import Optimizer
from turnfast.update.update import Update, update

TESTS = Path(__file__).parent
LOADING = threading.Lock()


def on_ranks(size: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """The return value or exception of `work` on each rank; ranks are threads."""
    store = dist.HashStore()
    start = threading.Barrier(size)

    def one(rank: int) -> Any:
        start.wait(30)
        try:
            return work(Ranks(rank, size, store=store, timeout_s=30.0))
        except Exception as error:  # returned to the test
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


def pack_on(ranks: Ranks, groups: Sequence[Group], budget: int, **options: Any) -> Packed:
    """Pack this rank's share of the rows of all ranks."""
    rows = trainable_rows(groups, assign_credits(groups, "mt_grpo"))
    return pack_step(
        join_ranks(ranks.all_gather_arrays(rows.arrays())),
        budget=budget,
        options=PackOptions(**options),
        rank=ranks.rank,
        num_ranks=ranks.size,
    )


def load(folder: Path) -> Policy:
    with LOADING:  # transformers loads one model at a time
        return load_policy(ModelConfig(), folder, torch.device("cpu"))


LOSS = LossConfig()


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepped:
    packed: Packed
    updates: list[Update]
    weights: list[torch.Tensor]
    gradients: list[torch.Tensor]


def two_steps(
    folder: Path, ranks: Ranks, *, rewritten: bool = False, loss: LossConfig = LOSS
) -> Stepped:
    """Two updates on groups that are dealt to the ranks, one by one."""
    policy = load(folder)
    config = OptimConfig(lr=1e-3, warmup_steps=0, grad_clip=0.05)
    optimizer = RecordingOptimizer(policy.model.parameters(), config, ranks=ranks)
    updates = []
    for seed in (7, 8):
        groups = ranks.shard([*make_groups(seed), *make_groups(seed + 10)])
        if rewritten:
            groups = [rewritten_late(group) for group in groups]
        whole = loss.ratio == "sequence"
        packed = pack_on(ranks, groups, budget=64, whole_trajectories=whole)
        updates.append(update(Learner(policy=policy, optimizer=optimizer), packed.batches, loss))
    weights = [p.detach().clone() for p in policy.model.parameters()]
    return Stepped(
        packed=packed, updates=updates, weights=weights, gradients=optimizer.gradients[0]
    )


def rewritten_late(group: Group) -> Group:
    """As a template leaves it that drops what was thought in earlier turns."""

    def late(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
        start = turns[0].prompt_ids
        return (
            turns[0],
            *(
                replace(turn, restart=True, prompt_ids=(*start, *turn.prompt_ids))
                for turn in turns[1:]
            ),
        )

    return replace(
        group, trajectories=tuple(replace(t, turns=late(t.turns)) for t in group.trajectories)
    )


SEQUENCES = LossConfig(
    ratio="sequence", clip_high=1e3, old_logprobs="sampler", max_logprob_gap=100.0
)


@pytest.mark.parametrize(
    ("size", "options"),
    [(2, {}), (3, {}), (5, {}), (3, {"rewritten": True, "loss": SEQUENCES})],
)
def test_the_step_of_several_ranks_is_that_of_one(tiny_folder, size, options, one_thread):
    """With five ranks one of them has no group at all, and yet a share of the rows."""
    alone = two_steps(tiny_folder, ALONE, **options)
    together = on_ranks(size, lambda ranks: two_steps(tiny_folder, ranks, **options))
    assert sum(each.packed.num_targets for each in together) == alone.packed.num_targets
    for expected, *each in zip(alone.gradients, *(s.gradients for s in together), strict=True):
        assert (sum(each) - expected).abs().max() <= 1e-6
    for stepped in together:
        for ours, first, expected in zip(
            stepped.weights, together[0].weights, alone.weights, strict=True
        ):
            assert torch.equal(ours, first)
            assert (ours - expected).abs().max() <= 1e-4  # of steps of 1e-3
        for ours, expected in zip(stepped.updates, alone.updates, strict=True):
            assert ours.loss == pytest.approx(expected.loss, abs=1e-6)
            assert ours.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
            assert ours.num_updates == expected.num_updates == 1


def test_sums_in_place_are_added_up_over_the_ranks(one_thread):
    """A bf16 head whose sum is float32: this rank has one, that one none, and a third both."""

    def step(ranks: Ranks) -> torch.Tensor:
        head = torch.nn.Parameter(torch.ones(5, 3, dtype=torch.bfloat16))
        optimizer = Optimizer(
            [head], OptimConfig(lr=0.1, warmup_steps=0, grad_clip=0.5), ranks=ranks
        )
        total = optimizer.grad_sum(head)
        if ranks.rank != 1:
            total += torch.arange(15.0).view(5, 3) / 64 - 0.1
        if ranks.rank == 2:
            head.grad = torch.full_like(head, 0.25)
        norm = optimizer.step()
        expected = 2 * (torch.arange(15.0).view(5, 3) / 64 - 0.1) + 0.25
        assert norm == pytest.approx(float(expected.norm()), rel=1e-6)
        return head.detach()

    first, *others = on_ranks(3, step)
    assert (first < 1).any() and all(torch.equal(first, other) for other in others)


def test_bf16_gradients_are_added_up_in_float32(one_thread):
    """What a rank adds is less than the last digit of a bf16 sum, and one has nothing to add."""

    def step(ranks: Ranks) -> float:
        weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
        config = OptimConfig(lr=0.1, warmup_steps=0, grad_clip=1e9)
        optimizer = Optimizer([weight], config, ranks=ranks)
        if ranks.rank < 2:
            with optimizer.accumulating():
                weight.backward(
                    torch.tensor([1.0, 1 / 512][ranks.rank : ranks.rank + 1]).bfloat16()
                )
        return optimizer.step()

    assert on_ranks(3, step) == [1 + 1 / 512] * 3


def test_the_log_prob_gap_is_a_mean_over_the_tokens_of_all_ranks(tiny_folder, one_thread):
    """The ranks have different numbers of tokens, so a mean of their means would differ."""

    def step(limit: float) -> Callable[[Ranks], Update]:
        def work(ranks: Ranks) -> Update:
            policy = load(tiny_folder)
            optimizer = Optimizer(policy.model.parameters(), OptimConfig(), ranks=ranks)
            groups = make_groups(7)
            batches = pack(groups, assign_credits(groups, "mt_grpo"), budget=32).batches
            mine = batches[:1] if ranks.rank == 0 else batches[1:]
            if ranks.size == 1:
                mine = batches
            far = [
                replace(b, sampler_logprobs_N=b.sampler_logprobs_N + 100.0 * (i > 0))
                for i, b in enumerate(batches)
            ]
            chosen = [far[i] for i, b in enumerate(batches) if any(b is x for x in mine)]
            config = LossConfig(old_logprobs="sampler", max_logprob_gap=limit)
            return update(Learner(policy=policy, optimizer=optimizer), chosen, config)

        return work

    alone = step(1000.0)(ALONE)
    for each in on_ranks(2, step(1000.0)):
        assert each.logprob_gap == pytest.approx(alone.logprob_gap, rel=1e-6)
        assert each.logprob_gap_max == pytest.approx(alone.logprob_gap_max, rel=1e-6)
        assert each.grad_norm > 0
    # too large on average, although rank 0's own gap is small
    refused = on_ranks(2, step(0.9 * alone.logprob_gap))
    assert all(isinstance(each, TrainingError) for each in refused)
    assert str(refused[0]) == str(refused[1])


def test_rows_are_balanced_and_some_rank_may_have_none(tiny_folder):
    def tokens(ranks: Ranks) -> tuple[int, int]:
        # all that there is comes from one rank
        groups = [*make_groups(1), *make_groups(2)] if ranks.is_leader else []
        packed = pack_on(ranks, groups, budget=1024)
        return packed.num_tokens, packed.num_targets

    counts = on_ranks(3, tokens)
    assert min(tokens for tokens, _ in counts) >= 0.5 * max(tokens for tokens, _ in counts)
    thirteen = on_ranks(13, tokens)  # twelve rows
    assert sorted(targets > 0 for _, targets in thirteen) == [False] + [True] * 12
    assert sum(targets for _, targets in thirteen) == sum(targets for _, targets in counts)


def test_rows_that_share_nothing_are_balanced_by_what_they_cost_alone():
    """One group with a long prompt, which counts for each of its rollouts, and three without."""

    def tokens(ranks: Ranks) -> int:
        groups = [
            by_hand.group_of(
                *(
                    by_hand.rollout(
                        i, [by_hand.turn(3, prompt_ids=(*range(length), g))], outcome=float(i)
                    )
                    for i in range(8)
                )
            )
            for g, length in enumerate((600, 60, 60, 60) if ranks.is_leader else ())
        ]
        return pack_on(ranks, groups, budget=6000, share_prefixes=False).num_tokens

    counts = on_ranks(4, tokens)
    assert counts == [2 * 603 + 6 * 63] * 4


def test_a_rank_without_batches_takes_the_step_with_the_others(tiny_folder, one_thread):
    """The only row is the other rank's; two updates, so that old log-probs are kept of nothing."""

    def step(ranks: Ranks) -> tuple[Update, list[torch.Tensor]]:
        policy = load(tiny_folder)
        optimizer = Optimizer(policy.model.parameters(), OptimConfig(warmup_steps=0), ranks=ranks)
        groups = make_groups(7)
        batches = pack(groups, assign_credits(groups, "mt_grpo"), budget=1024).batches
        mine = batches if ranks.rank == 1 else ()
        done = update(
            Learner(policy=policy, optimizer=optimizer),
            mine,
            LossConfig(),
            num_updates=2,
        )
        return done, [p.detach() for p in policy.model.parameters()]

    (idle, idle_weights), (busy, busy_weights) = on_ranks(2, step)
    assert idle.grad_norm == busy.grad_norm > 0 and idle.loss == busy.loss
    assert idle.num_updates == busy.num_updates == 2
    assert idle.entropy.count == 0 < busy.entropy.value
    assert all(map(torch.equal, idle_weights, busy_weights))


def test_collectives():
    assert (
        on_ranks(3, lambda ranks: ranks.all_gather({"é": [ranks.rank, None, 0.1]}))
        == [[{"é": [rank, None, 0.1]} for rank in range(3)]] * 3
    )
    assert on_ranks(3, lambda ranks: ranks.sum([ranks.rank, 0.5])) == [[3, 1.5]] * 3
    arrays = [np.arange(2.0), np.array([], np.int32), np.array([1 << 40])]
    for found in on_ranks(3, lambda r: r.all_gather_arrays([x[r.rank % 2 :] for x in arrays])):
        assert [[x.tolist() for x in each] for each in found] == [
            [[0.0, 1.0], [], [1 << 40]], [[1.0], [], []], [[0.0, 1.0], [], [1 << 40]],
        ]  # fmt: skip
        assert [x.dtype for x in found[1]] == [x.dtype for x in arrays]
    assert on_ranks(3, lambda ranks: ranks.any(ranks.rank == 2)) == [True] * 3
    assert on_ranks(3, lambda ranks: list(ranks.shard("abcd"))) == [["a", "d"], ["b"], ["c"]]
    assert (ALONE.all_gather(1), ALONE.sum([2.0]), ALONE.any(False)) == ([1], [2.0], False)
    assert ALONE.is_leader and ALONE.shard("ab") == "ab"


@pytest.mark.parametrize(
    ("errors", "raised"),
    [
        ({}, ["done"] * 3),
        (
            {1: SyncError("late"), 2: TrainingError("nan")},
            ["SyncError rank 1: late", "SyncError late", "SyncError rank 1: late"],
        ),
        ({2: KeyError("x")}, ["RankError rank 2: 'x'"] * 2 + ["KeyError 'x'"]),
        # an exception that only its own rank can raise comes first
        (
            {0: SyncError("late"), 1: ValueError("bad")},
            ["RankError rank 1: bad", "ValueError bad", "RankError rank 1: bad"],
        ),
    ],
)
def test_an_error_on_one_rank_is_raised_on_all(errors, raised):
    def work(ranks: Ranks) -> str:
        with ranks.share_errors():
            if ranks.rank in errors:
                raise errors[ranks.rank]
        return "done"

    found = on_ranks(3, work)
    shown = [f"{type(e).__name__} {e}" if isinstance(e, Exception) else e for e in found]
    assert shown == raised


def test_other_weights_are_refused():
    def check(ranks: Ranks) -> None:
        torch.manual_seed(0)
        layer = torch.nn.Linear(5, 3).to(torch.bfloat16)
        ranks.check_equal_weights(layer.parameters())
        if ranks.rank == 1:
            layer.weight.data[2, 4] = torch.nextafter(
                layer.weight.data[2, 4], torch.tensor(1.0, dtype=torch.bfloat16)
            )
        ranks.check_equal_weights(layer.parameters())

    for error in on_ranks(2, check):
        assert isinstance(error, RankError) and "hold different weights" in str(error)
    a, b = torch.arange(6.0), torch.ones(3, dtype=torch.bfloat16)
    assert checksum([a, b]) != checksum([a.flip(0) + 1, b]) != checksum([b, a])


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: 'two' is not a number"),
        ({"WORLD_SIZE": "2"}, "RANK: '' is not a number"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "MASTER_ADDR: not set, but WORLD_SIZE = 2"),
    ],
)
def test_a_torn_environment_is_refused(variables, text):
    with pytest.raises(ConfigError, match=text), open_ranks(variables, timeout_s=5.0):
        pass


def test_without_torchrun_there_is_one_rank():
    with open_ranks({}, timeout_s=5.0) as ranks:
        assert ranks is ALONE
    with open_ranks({"WORLD_SIZE": "1", "RANK": "0"}, timeout_s=5.0) as ranks:
        assert ranks is ALONE


@pytest.mark.parametrize("size", [1, 2, 3])
def test_places_are_dealt_and_go_on_where_they_were(size):
    tasks = [Task(id=str(i), question="") for i in range(5)]

    def places(ranks: Ranks) -> tuple[list[int], list[int]]:
        queue = open_queue(tasks, 3, {}, done=12, ranks=ranks)
        first = [prompt.place for prompt, _ in zip(queue.take(), range(4), strict=False)]
        everyone = ranks.all_gather(queue.state())
        again = open_queue(tasks, 3, {"data": everyone}, done=0, ranks=ranks)
        return first, [prompt.place for prompt, _ in zip(again.take(), range(2), strict=False)]

    dealt = on_ranks(size, places) if size > 1 else [places(ALONE)]
    # zip takes one prompt more than it gives
    assert [first for first, _ in dealt] == [
        list(range(12 + rank, 12 + rank + 4 * size, size)) for rank in range(size)
    ]
    assert all(again[0] > first[-1] for first, again in dealt)


def test_another_number_of_ranks_is_refused():
    state = {"data": [{"position": 4, "returned": []}, {"position": 5, "returned": []}]}
    with pytest.raises(ConfigError, match="written by 2 ranks and this run has 1"):
        open_queue([], 0, state, done=0)


@pytest.mark.parametrize("rule", ["mt_grpo", "mt_ppo"])
def test_whitening_is_refused_on_several_ranks(letters_model, tmp_path, rule):
    config = recipe(letters_model, credit__rule=rule, credit__options={"whiten": True})

    def opened(ranks: Ranks) -> None:
        with open_run(config, tmp_path / "run", ranks=ranks):
            pass

    for error in on_ranks(2, opened):
        assert isinstance(error, ConfigError)
        assert "credit.options.whiten: " in str(error) and "2 ranks" in str(error)
    with open_run(config, tmp_path / "run"):
        pass


# --- whole runs, a process per rank


def start(config: Path, run_dir: Path, size: int, *words: str) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ,
        "PYTHONPATH": str(TESTS),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    command = [sys.executable, "-m", "turnfast", "train", str(config), "--run-dir", str(run_dir)]
    return [
        subprocess.Popen(
            [*command, *words],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=config.parent,
        )
        for rank in range(size)
    ]


def ends_of(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    ends = []
    for process in processes:
        out, err = process.communicate(timeout=240)
        ends.append((process.returncode, out, err))
    return ends


def weights_of(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "checkpoints" / f"step_{step:06d}" / "model.safetensors")


STEPS = 6
FIELDS = {
    "optim__lr": 3e-5,
    "train__steps": STEPS,
    "train__eval_every": STEPS,
    "train__save_every": 1,
    "train__keep_checkpoints": STEPS + 1,
}


def started(model: Path, folder: Path, **changed: object) -> tuple[Path, list[subprocess.Popen]]:
    """A recipe, and two ranks that have done the first step of it."""
    path = folder / "letters.toml"
    path.write_text(to_toml(recipe(model, **{**FIELDS, **changed})))
    processes = start(path, folder / "two", 2)
    metrics = folder / "two" / "metrics.jsonl"
    end = time.monotonic() + 120
    while time.monotonic() < end and not (metrics.exists() and '"loss"' in metrics.read_text()):
        time.sleep(0.01)
    return path, processes


def test_two_processes_train_as_one_does(letters_model, tmp_path, monkeypatch, one_thread):
    """The same prompts and random numbers; the two are stopped by a signal to one, and resumed."""
    monkeypatch.syspath_prepend(str(TESTS))
    path, processes = started(letters_model, tmp_path)
    processes[1].send_signal(signal.SIGTERM)
    train(recipe(letters_model, **FIELDS), tmp_path / "one")
    first = ends_of(processes)
    last = max(line["step"] for line in read_metrics(tmp_path / "two"))
    assert [code for code, _, _ in first] == [0, 128 + signal.SIGTERM], first
    assert "stopped by SIGTERM" in first[1][2] and 1 <= last < STEPS
    assert (tmp_path / "two/checkpoints/latest").read_text().strip() == f"step_{last:06d}"

    second = ends_of(start(path, tmp_path / "two", 2, "--resume"))
    assert [code for code, _, _ in second] == [0, 0], second
    # only the first rank speaks and writes
    assert f"train {STEPS}/{STEPS}" in second[0][1] and second[1][1] == ""
    for step in range(1, STEPS + 1):
        one, two = weights_of(tmp_path / "one", step), weights_of(tmp_path / "two", step)
        assert max(float((two[name] - one[name]).abs().max()) for name in one) <= 1e-6, step
    lines = [training_lines(tmp_path / name) for name in ("one", "two")]
    for alone, both in zip(*lines, strict=True):
        for name in ("step", "rollouts", "tokens_sampled", "tokens_trained"):
            assert both[name] == alone[name], name
        for name in ("loss", "grad_norm", "reward/outcome", "reward/turn"):
            assert both[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-6), name
    evaluated = [line for line in read_metrics(tmp_path / "two") if "eval/rollouts" in line]
    assert [(line["step"], line["eval/rollouts"]) for line in evaluated] == [(0, 2), (STEPS, 2)]


def torchrun(config: Path, run_dir: Path, *words: str) -> subprocess.Popen:
    """Two ranks of torchrun's own making: its variables, its store, its signals."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.Popen(
        [*launch, "-m", "turnfast", "train", str(config), "--run-dir", str(run_dir), *words],
        env={**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=config.parent,
    )


def test_torchrun_trains_as_one_process_does(letters_model, tmp_path, monkeypatch, one_thread):
    monkeypatch.syspath_prepend(str(TESTS))
    fields = {**FIELDS, "train__steps": 2, "train__eval_every": 0}
    path = tmp_path / "letters.toml"
    path.write_text(to_toml(recipe(letters_model, **fields)))
    process = torchrun(path, tmp_path / "two")
    train(recipe(letters_model, **fields), tmp_path / "one")
    ((code, out, err),) = ends_of([process])
    assert code == 0 and "train 2/2" in out, err
    one, two = weights_of(tmp_path / "one", 2), weights_of(tmp_path / "two", 2)
    assert max(float((two[name] - one[name]).abs().max()) for name in one) <= 1e-6
    lines = [training_lines(tmp_path / name) for name in ("one", "two")]
    assert [line["rollouts"] for line in lines[1]] == [line["rollouts"] for line in lines[0]]
    assert lines[1][-1]["loss"] == pytest.approx(lines[0][-1]["loss"], rel=1e-4, abs=1e-6)


def test_a_rank_that_is_gone_stops_the_others(letters_model, tmp_path):
    _, processes = started(letters_model, tmp_path, train__steps=1000, train__eval_every=0)
    processes[1].kill()
    (code, _, err), _ = ends_of(processes)
    assert code == 1 and "rank 0 of 2 lost another rank" in err
    assert "Traceback" not in err


def test_uneven_prompts_are_refused_by_all_ranks(letters_model, tmp_path):
    config = recipe(letters_model, rollout__prompts_per_step=3)

    def opened(ranks: Ranks) -> None:
        with open_run(config, tmp_path / "run", ranks=ranks):
            pass

    for error in on_ranks(2, opened):
        assert isinstance(error, ConfigError)
        assert "3 prompts cannot be dealt evenly to 2 ranks" in str(error)
