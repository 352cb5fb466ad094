"""What a step trains on: the order of the data, cuts that lose nothing, groups without signal."""

from __future__ import annotations

import random
from collections import Counter
from itertools import islice
from pathlib import Path
from statistics import fmean

import pytest
import torch
from training_runs import recipe, stop_after, training_lines
from transformers import AutoModelForCausalLM

import turnfast.train
from turnfast.chat.template import Chat
from turnfast.config.recipe import build_config
from turnfast.config.schema import Config
from turnfast.envs import Outcome, Step, Task
from turnfast.errors import ConfigError, Interrupted
from turnfast.rollout.collect import Collector
from turnfast.rollout.prompts import PromptQueue, open_queue
from turnfast.rollout.setup import RolloutSetup
from turnfast.sampler.scripted import ScriptedSampler
from turnfast.sampler.sync import teacher_forced_logprobs
from turnfast.train import train

pytestmark = pytest.mark.usefixtures("one_thread")

TASKS = [Task(id=f"task {i}", question=f"Number {i}.") for i in range(10)]


class Dice(ScriptedSampler):
    """Replies whose length and ids are drawn from the request's seed, one token per step."""

    def __init__(self, end_id: int) -> None:
        super().__init__(lambda prompt_ids: (), pick=self._due)
        self._end_id = end_id
        self._now = 0
        self._end: dict[int, int] = {}

    def submit(self, request) -> None:
        super().submit(request)
        self._end[request.id] = self._now + len(self._ids(request))

    def step(self):
        self._now += 1
        return super().step()

    def _due(self, waiting):
        return [request for request in waiting if self._end[request.id] <= self._now]

    def _ids(self, request) -> tuple[int, ...]:
        draw = random.Random(request.seed)
        length = draw.choice((2, 3, 4, 40))
        return (*(draw.randrange(10, 250) for _ in range(length - 1)), self._end_id)

    def _complete(self, request):
        self._reply = lambda prompt_ids: self._ids(request)
        return super()._complete(request)


class Talk:
    """One turn or two; paid for the first id's parity, except on the tasks that are `flat`."""

    tools = ()
    native_calls = False

    def __init__(self, flat: tuple[str, ...] = ()) -> None:
        self.flat = flat

    def tasks(self, split):
        return TASKS

    def episode(self, task):
        return Talking(task, task.id in self.flat)


class Talking:
    def __init__(self, task: Task, flat: bool) -> None:
        self._task, self._flat, self._said = task, flat, []

    async def start(self):
        return [{"role": "user", "content": self._task.question}]

    async def step(self, text: str) -> Step:
        self._said.append(text)
        if len(self._said) == 1 and len(text) % 2:
            return Step(messages=({"role": "user", "content": "Go on."},))
        return Step(done=True)

    async def finish(self) -> Outcome:
        said = "".join(self._said)
        return Outcome(reward=0.0 if self._flat else float(sum(map(ord, said)) % 7))


def config_of(**rollout) -> Config:
    sizes = {"prompts_per_step": 4, "group_size": 2, "max_new_tokens": 64, "max_context": 480}
    return build_config({"rollout": {**sizes, **rollout}, "env": {"max_turns": 2}})


def collector_of(chat: Chat, config: Config, env=None, state=None, **options) -> Collector:
    setup = RolloutSetup(
        env=env or Talk(),
        chat=chat,
        sampler=Dice(chat.end_id),
        config=config.rollout,
        max_turns=config.env.max_turns,
        seed=config.train.seed,
    )
    prompts = PromptQueue(TASKS, seed=0, **(state or {}))
    options = {"first_step": 1, **options}
    return Collector(setup, prompts, config.train, config.credit, **options)


def drawn(group) -> tuple:
    return tuple(tuple(turn.sampled_ids for turn in t.turns) for t in group.trajectories)


def longest(group) -> int:
    return max(t.num_sampled for t in group.trajectories)


# --- the order of the data ------------------------------------------------------------------------


def test_every_pass_takes_every_task_once():
    prompts = PromptQueue(TASKS, seed=3).take()
    passes = [[next(prompts) for _ in TASKS] for _ in range(4)]
    assert all(sorted(p.task.id for p in one) == sorted(t.id for t in TASKS) for one in passes)
    assert [p.place for one in passes for p in one] == list(range(40))
    assert len({tuple(p.task.id for p in one) for one in passes}) == 4
    assert not any(p.must_finish for one in passes for p in one)


def test_what_is_given_back_comes_first_and_must_be_finished():
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


def test_a_checkpoint_that_does_not_say_where_the_data_stands():
    assert open_queue(TASKS, 0, {"step": 3}, done=12).state() == {"position": 12, "returned": []}


# --- early cut ------------------------------------------------------------------------------------


def test_a_cut_loses_nothing_and_changes_no_sample(chat):
    """Over many steps: each prompt trained once per pass, with the very draws it has uncut."""
    num_steps = 40
    with collector_of(chat, config_of()) as whole:
        steps = [whole.collect(step).groups for step in range(1, num_steps + 10)]
    uncut = dict(enumerate(group for groups in steps for group in groups))

    with collector_of(chat, config_of(oversample=0.5)) as cut:
        gathered = [cut.collect(step) for step in range(1, num_steps + 1)]
        data = cut.state(num_steps)["data"]
    trained = [group for one in gathered for group in one.groups]
    dropped = [prompt.place for one in gathered for prompt in one.dropped]
    assert len(dropped) == len(set(dropped)) >= num_steps / 2  # cut often, and no prompt twice
    assert all(4 <= len(one.groups) <= 6 for one in gathered)

    places = [place for place in range(data["position"]) if place not in data["returned"]]
    assert Counter(map(drawn, trained)) == Counter(drawn(uncut[place]) for place in places)
    counts = Counter(group.task.id for group in trained)
    assert max(counts.values()) - min(counts.values()) <= 1 + len(data["returned"])
    # the first step alone is what a cut without a queue would train on: too short
    everything = fmean(map(longest, trained))
    assert fmean(map(longest, gathered[0].groups)) < 0.8 * everything
    assert everything == pytest.approx(fmean(longest(uncut[p]) for p in places))


def test_a_cut_run_goes_on_from_its_state(chat):
    config = config_of(oversample=0.5)
    with collector_of(chat, config) as straight:
        expected = [[drawn(g) for g in straight.collect(step).groups] for step in range(1, 7)]
    with collector_of(chat, config) as first:
        legs = [[drawn(g) for g in first.collect(step).groups] for step in range(1, 4)]
        # what was collected after the checkpoint does not count
        first.collect(4)
        data = first.state(3)["data"]
    assert data["returned"]
    with collector_of(chat, config, state=data, first_step=4) as second:
        legs += [[drawn(g) for g in second.collect(step).groups] for step in range(4, 7)]
    assert legs == expected


# --- groups without signal ------------------------------------------------------------------------

FLAT = tuple(task.id for task in TASKS[:7])


def test_groups_without_signal_are_replaced(chat):
    order = list(islice(PromptQueue(TASKS, 0).take(), 30))
    with collector_of(chat, config_of(refill_waves=6), Talk(FLAT)) as collector:
        gathered = collector.collect(1)
        data = collector.state(1)["data"]
    signal = [len({t.outcome for t in group.trajectories}) > 1 for group in gathered.groups]
    assert sum(signal) == 4 and signal[-1]  # as few prompts as hold four with a signal
    assert gathered.num_refilled == len(signal) - 4 > 0
    assert [g.task for g in gathered.groups] == [p.task for p in order[: len(signal)]]
    assert data == {"position": len(signal), "returned": []}


@pytest.mark.parametrize("waves", [0, 1, 3])
def test_replacements_have_a_bound(chat, waves):
    everything = Talk(tuple(task.id for task in TASKS))
    with collector_of(chat, config_of(refill_waves=waves), everything) as collector:
        gathered = collector.collect(1)
    assert len(gathered.groups) == 4 * (1 + waves)
    assert gathered.num_refilled == 4 * waves and not gathered.dropped


def test_a_cut_and_replacements_together(chat):
    with collector_of(chat, config_of(refill_waves=6, oversample=0.5), Talk(FLAT)) as collector:
        gathered = [collector.collect(step) for step in range(1, 9)]
        data = collector.state(8)["data"]
    for one in gathered:
        assert sum(len({t.outcome for t in g.trajectories}) > 1 for g in one.groups) >= 4
    dropped = [prompt.place for one in gathered for prompt in one.dropped]
    assert len(dropped) == len(set(dropped)) > 0
    num_groups = sum(len(one.groups) for one in gathered)
    assert num_groups == data["position"] - len(data["returned"])


# --- through the loop -----------------------------------------------------------------------------

KEPT = {"train__eval_every": 0, "train__save_every": 1, "train__keep_checkpoints": 9}
OVERLAPPED = {**KEPT, "train__overlap": True, "loss__is_cap": 2.0}


def weights_after(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    folder = run_dir / "checkpoints" / f"step_{step:06d}"
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_a_cut_run_on_two_legs_is_the_run_on_one(letters_model, tmp_path):
    """Two slots for nine rollouts: groups end one after the other, and some are dropped."""
    changes = {**KEPT, "rollout__oversample": 0.5, "sampler__max_sequences": 2}
    train(recipe(letters_model, **changes), tmp_path / "straight")
    assert sum(line["groups_dropped"] for line in training_lines(tmp_path / "straight")) >= 3
    legs = tmp_path / "legs"
    train(recipe(letters_model, **changes, train__steps=2), legs)
    train(recipe(letters_model, **changes), legs, resume=True)
    expected, found = weights_after(tmp_path / "straight", 4), weights_after(legs, 4)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_overlap_needs_an_importance_weight(letters_model):
    with pytest.raises(ConfigError, match=r"train\.overlap: .*set loss\.is_cap"):
        recipe(letters_model, train__overlap=True)


@pytest.fixture
def packed_groups(monkeypatch) -> list:
    """The groups of every step, as the loop hands them to `trainable_rows`."""
    seen = []
    trainable_rows = turnfast.train.trainable_rows

    def noting(groups, credits):
        seen.append(groups)
        return trainable_rows(groups, credits)

    monkeypatch.setattr(turnfast.train, "trainable_rows", noting)
    return seen


def test_overlapped_rollouts_are_of_the_weights_of_one_step_before(
    letters_model, tmp_path, packed_groups
):
    train(recipe(letters_model, **OVERLAPPED), tmp_path / "run")
    policy = AutoModelForCausalLM.from_pretrained(letters_model)
    first = policy.state_dict()
    weights = [{name: value.clone() for name, value in first.items()}]
    weights += [weights_after(tmp_path / "run", step) for step in (1, 2, 3, 4)]

    def gap(step: int, weights_of_step: int) -> float:
        policy.load_state_dict(weights[weights_of_step])
        worst = 0.0
        for group in packed_groups[step - 1]:
            for trajectory in group.trajectories:
                ids: tuple[int, ...] = ()
                for turn in trajectory.turns:
                    ids += turn.prompt_ids + turn.sampled_ids
                    start = len(ids) - len(turn.sampled_ids)
                    ours = teacher_forced_logprobs(policy, ids, start)
                    worst = max(worst, float((ours - torch.tensor(turn.logprobs)).abs().max()))
        return worst

    assert gap(1, 0) <= 1e-4
    for step in (2, 3, 4):
        assert gap(step, step - 2) <= 1e-4  # the weights before the last sync
        assert gap(step, step - 1) > 1e-2  # not those that are trained
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


def test_a_stop_redoes_the_step_that_was_rolled_out_ahead(letters_model, tmp_path, packed_groups):
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


def test_an_error_in_the_training_ends_the_rollout_ahead(letters_model, tmp_path, monkeypatch):
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


def test_a_stop_while_the_collector_rolls_out(chat):
    with (
        collector_of(chat, config_of(), should_stop=stop_after(5)) as collector,
        pytest.raises(Interrupted),
    ):
        collector.collect(1)
    assert collector.state(0) == {"data": {"position": 0, "returned": []}}
