"""Data parallelism: steps and runs on several ranks match those on one rank.

Ranks are threads, or processes in tests of whole runs.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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
from turnfast.config.schema import CriticConfig, LossConfig, ModelConfig, OptimConfig
from turnfast.credit import assign_credits
from turnfast.errors import ConfigError, RankError, SyncError, TrainingError
from turnfast.metrics.reduce import reduce_metrics, to_plain, values_of
from turnfast.model import Policy, load_policy
from turnfast.packing.options import PackOptions
from turnfast.packing.pack import Packed, pack, pack_step, trainable_rows
from turnfast.packing.rows import join_ranks
from turnfast.parallel.ranks import ALONE, Ranks, checksum, open_ranks
from turnfast.rollout.prompts import open_queue
from turnfast.run import open_run
from turnfast.rundir.directory import read_metrics
from turnfast.train import train
from turnfast.types import Credit, Group, Task, Turn
from turnfast.update.critic import Critic
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


def pack_on(
    ranks: Ranks,
    groups: Sequence[Group],
    *,
    budget: int,
    credits: Sequence[Credit] | None = None,
    **options: Any,
) -> Packed:
    """Pack this rank's share of the rows of all ranks."""
    rows = trainable_rows(groups, credits or assign_credits(groups, "mt_grpo"))
    return pack_step(
        join_ranks(ranks.all_gather_arrays(rows.arrays())),
        budget=budget,
        options=PackOptions(**options),
        rank=ranks.rank,
        num_ranks=ranks.size,
    )


def load(folder: Path) -> Policy:
    with LOADING:  # transformers cannot load two models at the same time
        return load_policy(ModelConfig(), folder, torch.device("cpu"))


LOSS = LossConfig()


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """Two steps of one rank."""

    packed: Packed
    updates: list[Update]
    weights: list[torch.Tensor]
    gradients: list[torch.Tensor]


def two_steps(
    folder: Path,
    ranks: Ranks,
    *,
    restarts: bool = False,
    loss: LossConfig = LOSS,
    with_critic: bool = False,
) -> Steps:
    policy = load(folder)
    config = OptimConfig(lr=1e-3, warmup_steps=0, grad_clip=0.05)
    optimizer = RecordingOptimizer(policy.model.parameters(), config, ranks=ranks)
    critic = Critic(policy, CriticConfig(clip=None), config, ranks=ranks) if with_critic else None
    learner = Learner(policy=policy, optimizer=optimizer, critic=critic)
    updates = []
    for seed in (7, 8):
        groups = ranks.shard([*make_groups(seed), *make_groups(seed + 10)])
        if restarts:
            groups = [with_restarts(group) for group in groups]
        values = None
        if critic:
            values = critic.values(policy, groups, tokens_per_microbatch=64, share_prefixes=True)
        credits = assign_credits(groups, "mt_ppo" if critic else "mt_grpo", values=values)
        joined = loss.ratio == "sequence"
        packed = pack_on(ranks, groups, budget=64, credits=credits, whole_trajectories=joined)
        updates.append(update(learner, packed.batches, loss))
    trained = [*policy.model.parameters(), *(critic.head.parameters() if critic else ())]
    return Steps(
        packed=packed,
        updates=updates,
        weights=[p.detach().clone() for p in trained],
        gradients=optimizer.gradients[0],
    )


def with_restarts(group: Group) -> Group:
    """The group with a restart at every turn after the first."""

    def restarted(first: Turn, *others: Turn) -> tuple[Turn, ...]:
        prompts = ((*first.prompt_ids, *turn.prompt_ids) for turn in others)
        pairs = zip(others, prompts, strict=True)
        return first, *(replace(turn, restart=True, prompt_ids=ids) for turn, ids in pairs)

    trajectories = tuple(replace(t, turns=restarted(*t.turns)) for t in group.trajectories)
    return replace(group, trajectories=trajectories)


SEQUENCES = LossConfig(
    ratio="sequence", clip_high=1e3, old_logprobs="sampler", max_logprob_gap=100.0
)


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (2, {}),
        (2, {"with_critic": True}),
        (3, {"restarts": True, "loss": SEQUENCES}),
        (5, {}),  # four groups: one rank has none, but gets a share of the rows
    ],
)
def test_steps_on_several_ranks_match_one_rank(tiny_folder, size, options, one_thread):
    alone = two_steps(tiny_folder, ALONE, **options)
    together = on_ranks(size, lambda ranks: two_steps(tiny_folder, ranks, **options))
    assert sum(each.packed.num_targets for each in together) == alone.packed.num_targets
    for expected, *each in zip(alone.gradients, *(s.gradients for s in together), strict=True):
        assert (sum(each) - expected).abs().max() <= 1e-6
    for steps in together:
        for ours, first, expected in zip(
            steps.weights, together[0].weights, alone.weights, strict=True
        ):
            assert torch.equal(ours, first)
            assert (ours - expected).abs().max() <= 1e-4  # steps are 1e-3 (1e-2 of the critic)
        for ours, expected in zip(steps.updates, alone.updates, strict=True):
            assert ours.loss == pytest.approx(expected.loss, abs=1e-6)
            assert ours.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
            assert ours.num_updates == expected.num_updates == 1
            assert (ours.value_loss is not None) == bool(options.get("with_critic"))
            if ours.value_loss is not None:
                assert ours.value_loss == pytest.approx(expected.value_loss, rel=1e-4)
    for k, expected in enumerate(alone.updates):
        reduced = reduce_metrics([to_plain(stepped.updates[k].metrics()) for stepped in together])
        assert reduced == pytest.approx(values_of(expected.metrics()), rel=1e-3, abs=1e-5)


def test_in_place_sums_are_reduced_over_the_ranks(one_thread):
    """The float32 buffer of a bf16 head: rank 1 adds nothing, rank 2 also has a `.grad`."""

    def step(ranks: Ranks) -> torch.Tensor:
        head = torch.nn.Parameter(torch.ones(5, 3, dtype=torch.bfloat16))
        config = OptimConfig(lr=0.1, warmup_steps=0, grad_clip=0.5)
        optimizer = Optimizer([head], config, ranks=ranks)
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


def test_bf16_gradients_are_reduced_in_float32(one_thread):
    """Rank 1 adds less than the last digit of a bf16 sum, rank 2 has no gradient."""

    def step(ranks: Ranks) -> float:
        weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
        config = OptimConfig(lr=0.1, warmup_steps=0, grad_clip=1e9)
        optimizer = Optimizer([weight], config, ranks=ranks)
        if ranks.rank < 2:
            gradient = torch.tensor([1.0 if ranks.is_leader else 1 / 512])
            with optimizer.accumulating():
                weight.backward(gradient.bfloat16())
        return optimizer.step()

    assert on_ranks(3, step) == [1 + 1 / 512] * 3


def test_the_log_prob_gap_is_a_mean_over_the_tokens_of_all_ranks(tiny_folder, one_thread):
    """The ranks have different numbers of tokens, so a mean of their means would differ."""

    def step(limit: float) -> Callable[[Ranks], Update]:
        def work(ranks: Ranks) -> Update:
            policy = load(tiny_folder)
            optimizer = Optimizer(policy.model.parameters(), OptimConfig(), ranks=ranks)
            groups = make_groups(7)
            first, *others = pack(groups, assign_credits(groups, "mt_grpo"), budget=32).batches
            others = [replace(b, sampler_logprobs_N=b.sampler_logprobs_N + 100.0) for b in others]
            batches = {0: [first], 1: others}[ranks.rank] if ranks.size > 1 else [first, *others]
            config = LossConfig(old_logprobs="sampler", max_logprob_gap=limit)
            return update(Learner(policy=policy, optimizer=optimizer), batches, config)

        return work

    alone = step(1000.0)(ALONE)
    for each in on_ranks(2, step(1000.0)):
        assert each.logprob_gap == pytest.approx(alone.logprob_gap, rel=1e-6)
        assert each.logprob_gap_max == pytest.approx(alone.logprob_gap_max, rel=1e-6)
        assert each.grad_norm > 0
    # rank 0 fails too, although its own gap is small
    refused = on_ranks(2, step(0.9 * alone.logprob_gap))
    assert all(isinstance(each, TrainingError) for each in refused)
    assert str(refused[0]) == str(refused[1])


def test_rows_are_balanced_over_the_ranks():
    def tokens(ranks: Ranks) -> tuple[int, int]:
        # all groups are on the first rank
        groups = [*make_groups(1), *make_groups(2)] if ranks.is_leader else []
        packed = pack_on(ranks, groups, budget=1024)
        return packed.num_tokens, packed.num_targets

    counts = on_ranks(3, tokens)
    assert min(tokens for tokens, _ in counts) >= 0.5 * max(tokens for tokens, _ in counts)
    thirteen = on_ranks(13, tokens)  # there are twelve rows
    assert sorted(targets > 0 for _, targets in thirteen) == [False] + [True] * 12
    assert sum(targets for _, targets in thirteen) == sum(targets for _, targets in counts)


def test_without_shared_prefixes_rows_are_balanced_by_their_full_length():
    """One group has a long prompt, which counts once per rollout."""

    def tokens(ranks: Ranks) -> int:
        groups = []
        for g, length in enumerate((600, 60, 60, 60) if ranks.is_leader else ()):
            turns = [by_hand.turn(3, prompt_ids=(*range(length), g))]
            rollouts = (by_hand.rollout(i, turns, outcome=float(i)) for i in range(8))
            groups.append(by_hand.group_of(*rollouts))
        return pack_on(ranks, groups, budget=6000, share_prefixes=False).num_tokens

    counts = on_ranks(4, tokens)
    assert counts == [2 * 603 + 6 * 63] * 4


def test_a_rank_without_batches_takes_the_same_steps(tiny_folder, one_thread):
    def step(ranks: Ranks) -> tuple[Update, list[torch.Tensor]]:
        policy = load(tiny_folder)
        optimizer = Optimizer(policy.model.parameters(), OptimConfig(warmup_steps=0), ranks=ranks)
        groups = make_groups(7)
        batches = pack(groups, assign_credits(groups, "mt_grpo"), budget=1024).batches
        mine = batches if ranks.rank == 1 else ()
        done = update(Learner(policy=policy, optimizer=optimizer), mine, LOSS, num_updates=2)
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
    for result in on_ranks(3, lambda r: r.all_gather_arrays([x[r.rank % 2 :] for x in arrays])):
        assert [[x.tolist() for x in each] for each in result] == [
            [[0.0, 1.0], [], [1 << 40]], [[1.0], [], []], [[0.0, 1.0], [], [1 << 40]],
        ]  # fmt: skip
        assert [x.dtype for x in result[1]] == [x.dtype for x in arrays]
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

    results = on_ranks(3, work)
    texts = [f"{type(e).__name__} {e}" if isinstance(e, Exception) else e for e in results]
    assert texts == raised


def test_different_weights_are_refused():
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
def test_wrong_environment_variables_are_refused(variables, text):
    with pytest.raises(ConfigError, match=text), open_ranks(variables, timeout_s=5.0):
        pass


@pytest.mark.parametrize("variables", [{}, {"WORLD_SIZE": "1", "RANK": "0"}])
def test_one_process_is_one_rank(variables):
    with open_ranks(variables, timeout_s=5.0) as ranks:
        assert ranks is ALONE


@pytest.mark.parametrize("size", [1, 2, 3])
def test_prompts_are_sharded_and_continue_after_a_checkpoint(size):
    tasks = [Task(id=str(i), question="") for i in range(5)]

    def places(ranks: Ranks) -> tuple[list[int], list[int]]:
        queue = open_queue(tasks, 3, {}, done=12, ranks=ranks)
        first = [prompt.place for prompt, _ in zip(queue.take(), range(4), strict=False)]
        states = ranks.all_gather(queue.state())
        resumed = open_queue(tasks, 3, {"data": states}, done=0, ranks=ranks)
        return first, [prompt.place for prompt, _ in zip(resumed.take(), range(2), strict=False)]

    taken = on_ranks(size, places) if size > 1 else [places(ALONE)]
    for rank, (first, resumed) in enumerate(taken):
        assert first == list(range(12 + rank, 12 + rank + 4 * size, size))
        assert resumed[0] > first[-1]


def test_another_number_of_ranks_is_refused():
    state = {"data": [{"position": 4, "returned": []}, {"position": 5, "returned": []}]}
    with pytest.raises(ConfigError, match="written by 2 ranks and this run has 1"):
        open_queue([], 0, state, done=0)


def whitening(rule: str) -> dict[str, object]:
    return {"credit__rule": rule, "credit__options": {"whiten": True}}


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        (whitening("mt_grpo"), r"^credit\.options\.whiten: .*2 ranks"),
        (whitening("mt_ppo"), r"^credit\.options\.whiten: .*2 ranks"),
        ({"rollout__prompts_per_step": 3}, r"^rollout\.prompts_per_step: 3"),
    ],
)
def test_recipes_that_need_one_rank_are_refused_on_two(letters_model, tmp_path, changed, text):
    config = recipe(letters_model, **changed)

    def open_and_close(ranks: Ranks) -> None:
        with open_run(config, tmp_path / "run", ranks=ranks):
            pass

    for error in on_ranks(2, open_and_close):
        assert isinstance(error, ConfigError) and re.search(text, str(error))
    open_and_close(ALONE)


def environment(**variables: object) -> dict[str, str]:
    """The variables of this process, with the letters environment on the path."""
    path = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    added = {name: str(value) for name, value in variables.items()}
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **added}


def launch(recipe: Path, run_dir: Path, module: list[str], env: dict[str, str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", *module, "train", str(recipe), "--run-dir", str(run_dir)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=recipe.parent,
    )


@contextmanager
def two_ranks(model: Path, folder: Path, **changed: object) -> Iterator[list[subprocess.Popen]]:
    """Two ranks that have finished the first step of `folder/letters.toml`."""
    path = folder / "letters.toml"
    path.write_text(to_toml(recipe(model, **changed)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        launch(path, folder / "two", ["turnfast"], environment(**shared, RANK=r, LOCAL_RANK=r))
        for r in range(2)
    ]
    metrics = folder / "two" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    try:
        while not (metrics.exists() and '"loss"' in metrics.read_text()):
            assert time.monotonic() < deadline, "the first step took too long"
            time.sleep(0.01)
        yield processes
    finally:
        for process in processes:
            process.kill()


def results_of(*processes: subprocess.Popen) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each process."""
    outputs = [process.communicate(timeout=240) for process in processes]
    return [(p.returncode, *texts) for p, texts in zip(processes, outputs, strict=True)]


def weights_of(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "checkpoints" / f"step_{step:06d}" / "model.safetensors")


def test_two_processes_train_like_one(letters_model, tmp_path, monkeypatch, one_thread):
    """A signal to one rank stops both; torchrun resumes the run."""
    monkeypatch.syspath_prepend(str(TESTS))
    num_steps = 5
    fields = {
        "optim__lr": 3e-5,
        "train__steps": num_steps,
        "train__eval_every": num_steps,
        "train__save_every": 1,
        "train__keep_checkpoints": num_steps + 1,
    }
    with two_ranks(letters_model, tmp_path, **fields) as processes:
        processes[1].send_signal(signal.SIGTERM)
        train(recipe(letters_model, **fields), tmp_path / "one")
        first = results_of(*processes)
    last = max(line["step"] for line in read_metrics(tmp_path / "two"))
    assert [code for code, _, _ in first] == [0, 128 + signal.SIGTERM], first
    assert "stopped by SIGTERM" in first[1][2] and 1 <= last < num_steps
    assert (tmp_path / "two/checkpoints/latest").read_text().strip() == f"step_{last:06d}"
    assert first[1][1] == ""  # only the first rank prints

    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "turnfast"]
    arguments = ["train", str(tmp_path / "letters.toml"), "--run-dir", str(tmp_path / "two")]
    second = subprocess.run(
        [sys.executable, "-m", *torchrun, *arguments, "--resume"],
        env=environment(), capture_output=True, text=True, cwd=tmp_path, timeout=240,
    )  # fmt: skip
    assert second.returncode == 0 and f"train {num_steps}/{num_steps}" in second.stdout, second
    for step in range(1, num_steps + 1):
        one, two = weights_of(tmp_path / "one", step), weights_of(tmp_path / "two", step)
        assert max(float((two[name] - one[name]).abs().max()) for name in one) <= 1e-6, step
    lines = [training_lines(tmp_path / name) for name in ("one", "two")]
    for alone, both in zip(*lines, strict=True):
        for name in ("step", "rollouts", "tokens_sampled", "tokens_trained"):
            assert both[name] == alone[name], name
        for name in ("loss", "grad_norm", "reward/outcome", "reward/turn", "entropy", "logprob"):
            assert both[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-6), name
    evaluated = [line for line in read_metrics(tmp_path / "two") if "eval/rollouts" in line]
    counts = [(line["step"], line["eval/rollouts"]) for line in evaluated]
    assert counts == [(0, 2), (num_steps, 2)]


def test_a_killed_rank_ends_the_others(letters_model, tmp_path):
    fields = {"train__steps": 1000, "train__eval_every": 0}
    with two_ranks(letters_model, tmp_path, **fields) as processes:
        processes[1].kill()
        (code, _, err), _ = results_of(*processes)
    assert code == 1 and "rank 0 of 2 lost another rank" in err
    assert "Traceback" not in err
