"""What a step trains on: the order of the data, dropped prompts, groups without signal."""

from __future__ import annotations

import random
from collections import Counter
from itertools import islice
from pathlib import Path
from statistics import fmean

import pytest
import torch
from by_script import EnvOf, setup_of
from training_runs import recipe, stop_after, training_lines, weights
from transformers import AutoModelForCausalLM
from two_turns import forward_logprobs

import turnfast.train
from turnfast.chat.template import Chat
from turnfast.config.schema import CreditConfig, TrainConfig
from turnfast.envs import Outcome, Step, Task
from turnfast.errors import ConfigError, Interrupted
from turnfast.rollout.collect import Collector
from turnfast.rollout.prompts import PromptQueue, open_queue
from turnfast.sampler.scripted import ScriptedSampler
from turnfast.train import train

pytestmark = pytest.mark.usefixtures("one_thread")

TASKS = [Task(id=f"task {i}", question=f"Number {i}.") for i in range(10)]


class Dice(ScriptedSampler):
    """Replies whose length and ids depend on the request's seed, one token per step."""

    def __init__(self, end_id: int) -> None:
        super().__init__(self.reply, pick=self.finished)
        self.end_id = end_id
        self.now = 0
        self.ends: dict[int, int] = {}

    def submit(self, request) -> None:
        super().submit(request)
        self.ends[request.id] = self.now + len(self.reply(request))

    def finished(self, waiting):
        self.now += 1
        return [request for request in waiting if self.ends[request.id] <= self.now]

    def reply(self, request) -> tuple[int, ...]:
        draw = random.Random(request.seed)
        length = draw.choice((2, 3, 4, 40))
        return (*(draw.randrange(10, 250) for _ in range(length - 1)), self.end_id)


class OneOrTwoTurns:
    """An episode whose reward depends on the text, or is 0 if `flat`."""

    def __init__(self, flat: bool) -> None:
        self._flat, self._texts = flat, []

    async def start(self):
        return [{"role": "user", "content": "Go."}]

    async def step(self, text: str) -> Step:
        self._texts.append(text)
        if len(self._texts) == 1 and len(text) % 2:
            return Step(messages=({"role": "user", "content": "Go on."},))
        return Step(done=True)

    async def finish(self) -> Outcome:
        text = "".join(self._texts)
        return Outcome(reward=0.0 if self._flat else float(sum(map(ord, text)) % 7))


def collector_of(
    chat: Chat, *, flat=(), state=None, first_step=1, should_stop=lambda: False, **rollout
) -> Collector:
    """Four prompts per step, two rollouts each; tasks in `flat` give no signal."""
    env = EnvOf(lambda task: OneOrTwoTurns(task in flat))
    sizes = {"prompts_per_step": 4, "max_new_tokens": 64, "max_turns": 2, **rollout}
    return Collector(
        setup_of(env, chat, Dice(chat.end_id), **sizes),
        PromptQueue(TASKS, seed=0, **(state or {})),
        TrainConfig(),
        CreditConfig(),
        first_step=first_step,
        should_stop=should_stop,
    )


def drawn(group) -> tuple:
    return tuple(tuple(turn.sampled_ids for turn in t.turns) for t in group.trajectories)


def longest(group) -> int:
    return max(t.num_sampled for t in group.trajectories)


def test_every_pass_takes_every_task_once():
    prompts = PromptQueue(TASKS, seed=3).take()
    passes = [[next(prompts) for _ in TASKS] for _ in range(4)]
    for each in passes:
        assert sorted(p.task.id for p in each) == sorted(task.id for task in TASKS)
    assert [p.place for each in passes for p in each] == list(range(40))
    assert len({tuple(p.task.id for p in each) for each in passes}) == 4
    assert not any(p.must_finish for each in passes for p in each)


def test_prompts_that_were_put_back_come_first_and_must_finish():
    queue = PromptQueue(TASKS, seed=3)
    taken = [next(queue.take()) for _ in range(6)]
    queue.put_back([taken[4], taken[1]])
    state = queue.state()
    assert state == {"position": 6, "returned": [1, 4]}
    for again in (queue, open_queue(TASKS, 3, {"step": 1, "data": state}, done=99)):
        prompts = again.take()
        following = [next(prompts) for _ in range(4)]
        assert [p.place for p in following] == [1, 4, 6, 7]
        assert [p.must_finish for p in following] == [True, True, False, False]
        assert [p.task for p in following[:2]] == [taken[1].task, taken[4].task]
    # a checkpoint without a data position
    assert open_queue(TASKS, 0, {"step": 3}, done=12).state() == {"position": 12, "returned": []}


def test_dropping_loses_no_prompt_and_changes_no_sample(chat):
    """Each prompt is trained once per pass, with the samples it has without dropping."""
    num_steps = 40
    with collector_of(chat) as collector:
        steps = [collector.collect(step).groups for step in range(1, num_steps + 10)]
    by_place = dict(enumerate(group for groups in steps for group in groups))

    with collector_of(chat, oversample=0.5) as collector:
        collected = [collector.collect(step) for step in range(1, num_steps + 1)]
        data = collector.state(num_steps)["data"]
    trained = [group for each in collected for group in each.groups]
    dropped = [prompt.place for each in collected for prompt in each.dropped]
    assert len(dropped) == len(set(dropped)) >= num_steps / 2  # often, and no prompt twice
    assert all(4 <= len(each.groups) <= 6 for each in collected)

    places = [place for place in range(data["position"]) if place not in data["returned"]]
    assert Counter(map(drawn, trained)) == Counter(drawn(by_place[place]) for place in places)
    counts = Counter(group.task.id for group in trained)
    assert max(counts.values()) - min(counts.values()) <= 1 + len(data["returned"])
    # the first step alone has too many short rollouts, all steps together do not
    mean_longest = fmean(map(longest, trained))
    assert fmean(map(longest, collected[0].groups)) < 0.8 * mean_longest
    assert mean_longest == pytest.approx(fmean(longest(by_place[p]) for p in places))


def test_a_collector_resumes_from_its_state(chat):
    with collector_of(chat, oversample=0.5) as straight:
        expected = [[drawn(g) for g in straight.collect(step).groups] for step in range(1, 7)]
    with collector_of(chat, oversample=0.5) as first:
        legs = [[drawn(g) for g in first.collect(step).groups] for step in range(1, 4)]
        first.collect(4)  # after the checkpoint, so it does not count
        data = first.state(3)["data"]
    assert data["returned"]
    with collector_of(chat, oversample=0.5, state=data, first_step=4) as second:
        legs += [[drawn(g) for g in second.collect(step).groups] for step in range(4, 7)]
    assert legs == expected


FLAT = TASKS[:7]


def test_groups_without_signal_are_replaced(chat):
    order = list(islice(PromptQueue(TASKS, 0).take(), 30))
    with collector_of(chat, flat=FLAT, refill_waves=6) as collector:
        collected = collector.collect(1)
        data = collector.state(1)["data"]
    signal = [len({t.outcome for t in group.trajectories}) > 1 for group in collected.groups]
    assert sum(signal) == 4 and signal[-1]  # no more prompts than needed for four with signal
    assert collected.num_refilled == len(signal) - 4 > 0
    assert [g.task for g in collected.groups] == [p.task for p in order[: len(signal)]]
    assert data == {"position": len(signal), "returned": []}


@pytest.mark.parametrize("waves", [0, 1, 3])
def test_replacements_are_limited(chat, waves):
    with collector_of(chat, flat=TASKS, refill_waves=waves) as collector:
        collected = collector.collect(1)
    assert len(collected.groups) == 4 * (1 + waves)
    assert collected.num_refilled == 4 * waves and not collected.dropped


def test_dropping_and_replacements_together(chat):
    with collector_of(chat, flat=FLAT, refill_waves=6, oversample=0.5) as collector:
        collected = [collector.collect(step) for step in range(1, 9)]
        data = collector.state(8)["data"]
    for each in collected:
        assert sum(len({t.outcome for t in g.trajectories}) > 1 for g in each.groups) >= 4
    dropped = [prompt.place for each in collected for prompt in each.dropped]
    assert len(dropped) == len(set(dropped)) > 0
    num_groups = sum(len(each.groups) for each in collected)
    assert num_groups == data["position"] - len(data["returned"])


KEPT = {"train__eval_every": 0, "train__save_every": 1, "train__keep_checkpoints": 9}
OVERLAPPED = {**KEPT, "train__overlap": True, "loss__is_cap": 2.0}


def weights_after(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    folder = run_dir / "checkpoints" / f"step_{step:06d}"
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_a_resumed_run_that_drops_prompts_equals_an_uninterrupted_one(letters_model, tmp_path):
    """Two slots for nine rollouts: groups finish one after the other, and some are dropped."""
    changes = {**KEPT, "rollout__oversample": 0.5, "sampler__max_sequences": 2}
    train(recipe(letters_model, **changes), tmp_path / "straight")
    assert sum(line["groups_dropped"] for line in training_lines(tmp_path / "straight")) >= 3
    resumed = tmp_path / "resumed"
    train(recipe(letters_model, **changes, train__steps=2), resumed)
    train(recipe(letters_model, **changes), resumed, resume=True)
    assert weights(resumed, 4) == weights(tmp_path / "straight", 4)


def test_overlap_needs_an_importance_weight(letters_model):
    with pytest.raises(ConfigError, match=r"train\.overlap: .*set loss\.is_cap"):
        recipe(letters_model, train__overlap=True)


@pytest.fixture
def packed_groups(monkeypatch) -> list:
    """The groups of every step, as training passes them to `trainable_rows`."""
    packed = []
    trainable_rows = turnfast.train.trainable_rows

    def record(groups, credits):
        packed.append(groups)
        return trainable_rows(groups, credits)

    monkeypatch.setattr(turnfast.train, "trainable_rows", record)
    return packed


def test_overlapped_rollouts_use_the_weights_of_the_previous_step(
    letters_model, tmp_path, packed_groups
):
    train(recipe(letters_model, **OVERLAPPED), tmp_path / "run")
    policy = AutoModelForCausalLM.from_pretrained(letters_model)
    first = policy.state_dict()
    sampled_with = [{name: value.clone() for name, value in first.items()}]
    sampled_with += [weights_after(tmp_path / "run", step) for step in (1, 2, 3, 4)]

    def gap(step: int, weights_of_step: int) -> float:
        policy.load_state_dict(sampled_with[weights_of_step])
        worst = 0.0
        for group in packed_groups[step - 1]:
            for trajectory in group.trajectories:
                ids: tuple[int, ...] = ()
                for turn in trajectory.turns:
                    ids += turn.prompt_ids + turn.sampled_ids
                    start = len(ids) - len(turn.sampled_ids)
                    ours = forward_logprobs(policy, ids, start)
                    worst = max(worst, float((ours - torch.tensor(turn.logprobs)).abs().max()))
        return worst

    assert gap(1, 0) <= 1e-4
    for step in (2, 3, 4):
        assert gap(step, step - 2) <= 1e-4  # before the last sync
        assert gap(step, step - 1) > 1e-2  # the trained ones
    lines = training_lines(tmp_path / "run")
    assert lines[0]["logprob_gap/max"] <= 1e-4
    assert all(line["logprob_gap/max"] > 1e-3 for line in lines[1:])
    assert all(line["sync_gap"] <= 1e-4 for line in lines)


def test_training_with_overlap_learns(letters_model, tmp_path):
    config = recipe(
        letters_model,
        **{**OVERLAPPED, "train__save_every": 0},
        rollout__prompts_per_step=4,
        rollout__group_size=8,
        optim__lr=5e-3,
        train__steps=30,
    )
    train(config, tmp_path / "run")
    rewards = [
        line["reward/outcome"] + line["reward/turn"] for line in training_lines(tmp_path / "run")
    ]
    assert fmean(rewards[-5:]) > fmean(rewards[:5]) + 0.3


def test_resume_repeats_the_step_that_was_rolled_out_ahead(letters_model, tmp_path, packed_groups):
    run_dir = tmp_path / "run"

    def after_two_steps() -> bool:
        return (run_dir / "checkpoints" / "step_000002").exists()

    train(recipe(letters_model, **OVERLAPPED), run_dir, should_stop=after_two_steps)
    assert [line["step"] for line in training_lines(run_dir)] == [1, 2]
    train(recipe(letters_model, **OVERLAPPED), run_dir, resume=True)
    assert [line["step"] for line in training_lines(run_dir)] == [1, 2, 3, 4]
    train(recipe(letters_model, **KEPT), tmp_path / "plain")
    tasks = [[group.task.id for group in groups] for groups in packed_groups]
    assert tasks[:4] == tasks[4:]  # no prompt is lost or trained twice


def test_an_error_in_training_ends_the_rollout_ahead(letters_model, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no such gradient")

    monkeypatch.setattr(turnfast.train, "update", fail)
    config = recipe(
        letters_model,
        **OVERLAPPED,
        env__options={"wait_s": 60.0},
        rollout__trajectory_timeout_s=0.3,
        rollout__max_error_share=1.0,
    )
    with pytest.raises(RuntimeError, match="no such gradient"):
        train(config, tmp_path / "run")


def test_a_stop_during_the_rollout(chat):
    with (
        collector_of(chat, should_stop=stop_after(5)) as collector,
        pytest.raises(Interrupted),
    ):
        collector.collect(1)
    assert collector.state(0) == {"data": {"position": 0, "returned": []}}
