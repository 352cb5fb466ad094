"""Rollouts with a scripted sampler: order, faults, deadlines, stops, and token identity."""

from __future__ import annotations

import asyncio
import random
import re
import threading
import time
from dataclasses import replace
from itertools import pairwise

import pytest
from by_script import roll_out
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from turnfast.chat.template import Chat
from turnfast.config.schema import RolloutConfig
from turnfast.credit import assign_credits
from turnfast.envs import Outcome, Reward, Step, Task, ToolEnv, tool
from turnfast.errors import Interrupted, RolloutError
from turnfast.metrics.reduce import values_of
from turnfast.metrics.rollouts import summarise
from turnfast.packing.options import PackOptions
from turnfast.packing.pack import pack
from turnfast.rollout.groups import collect_groups
from turnfast.rollout.schedule import Prompt, Quota
from turnfast.rollout.setup import RolloutSetup
from turnfast.sampler.local import LocalSampler
from turnfast.sampler.scripted import (
    ScriptedSampler,
    everything,
    newest,
    oldest,
    shuffled,
)
from turnfast.types import Credit

LIMITS = dict(group_size=2, max_new_tokens=64, max_context=480, trajectory_timeout_s=60)
ANSWER = "<answer>done</answer>"


def call(name: str, **args: str) -> str:
    inner = ", ".join(f'"{key}": "{value}"' for key, value in args.items())
    return f'<tool>{{"name": "{name}", "args": {{{inner}}}}}</tool>'


def task(name: str) -> Task:
    return Task(id=name, question=f"task {name}", answers=("done",))


class Recorder(ScriptedSampler):
    """Notes every request, and what was asked in it."""

    def __init__(self, chat: Chat, say, *, pick=everything) -> None:
        self.requests = []
        self.prompts: list[str] = []
        self._chat, self._say = chat, say
        super().__init__(self._answer, pick=pick)

    def submit(self, request) -> None:
        self.requests.append(request)
        self.prompts.append(self._chat.tokenizer.decode(request.prompt_ids))
        super().submit(request)

    def _answer(self, request):
        return self._chat.encode_turn(self._say(self._chat.tokenizer.decode(request.prompt_ids)))


class Workshop(ToolEnv):
    """Tools that work, and tools with every fault there is."""

    def __init__(self, **options) -> None:
        super().__init__(instructions="", max_result_chars=1000, **options)
        self.gate: asyncio.Event | None = None
        self.release = threading.Event()

    def tasks(self, split):
        return [task("a"), task("b")]

    @tool
    def echo(self, text: str) -> str:
        """Say it again."""
        return text

    @tool
    async def wait(self) -> str:
        """Until the gate opens."""
        assert self.gate is not None
        await self.gate.wait()
        return "open"

    @tool
    def hang(self) -> str:
        """Hold a thread."""
        self.release.wait(30)
        return "late"

    @tool
    def crash(self) -> str:
        """Raise."""
        raise ZeroDivisionError("the drill broke")

    @tool
    def flood(self) -> str:
        """Too much of everything."""
        return "x" * 5000

    @tool
    def garbled(self) -> str:
        """Not UTF-8."""
        return b"\xff\xfe".decode("utf-8", errors="surrogateescape")


@pytest.fixture
def workshop():
    env = Workshop()
    env.set_limits(max_turns=4, tool_timeout_s=30.0)
    yield env
    env.release.set()


def work(chat, workshop, sampler, **changed):
    """Both tasks, at most four turns each."""
    tasks = workshop.tasks("train")
    return roll_out(workshop, chat, sampler, tasks, **{**LIMITS, "max_turns": 4, **changed})


def timeless(groups):
    return [
        replace(group, trajectories=tuple(replace(t, time_s=0.0) for t in group.trajectories))
        for group in groups
    ]


# --- order ----------------------------------------------------------------------------------------


def test_a_slow_tool_delays_its_own_trajectory_alone(chat, workshop):
    """The tool of `a` returns only after `b` has asked for its fourth turn: in lock step that would
    never come."""
    workshop.gate = asyncio.Event()

    def say(prompt: str) -> str:
        if "task a" in prompt:
            return ANSWER if "open" in prompt else call("wait")
        if prompt.count("assistant") == 4:
            workshop.gate.set()
            return ANSWER
        return call("echo", text="b")

    sampler = Recorder(chat, say)
    groups = work(chat, workshop, sampler, seed=0, group_size=1)
    order = ["a" if "task a" in prompt else "b" for prompt in sampler.prompts]
    assert order == ["a", "b", "b", "b", "b", "a"]
    assert [t.status for group in groups for t in group.trajectories] == ["finished"] * 2
    assert [len(t.turns) for group in groups for t in group.trajectories] == [2, 4]


@pytest.mark.parametrize("pick", [everything, oldest, newest, shuffled(1), shuffled(2)])
def test_same_groups_whatever_finishes_first(chat, workshop, pick):
    def say(prompt: str) -> str:
        depth = prompt.count("assistant")
        return ANSWER if depth > 2 else call("echo", text=f"{depth} {len(prompt)}")

    def play(pick):
        sampler = Recorder(chat, say, pick=pick)
        groups = work(chat, workshop, sampler, seed=3)
        seeds = {(request.prompt_ids, request.seed) for request in sampler.requests}
        assert sampler.num_pending == 0
        return timeless(groups), seeds

    assert play(pick) == play(everything)


@pytest.mark.parametrize("num_slots", [1, 3, 16])
def test_same_samples_in_batches_of_any_size(tiny_folder, chat, workshop, num_slots):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)

    def play(slots: int):
        sampler = LocalSampler(model, stop_ids=chat.stop_ids, num_slots=slots, max_context=480)
        env = Workshop(missing_answer="remind")
        limits = {**LIMITS, "max_new_tokens": 6, "max_turns": 3, "seed": 5}
        groups = roll_out(env, chat, sampler, env.tasks("train"), **limits)
        return [
            [turn.sampled_ids for turn in t.turns] for group in groups for t in group.trajectories
        ]

    samples = play(num_slots)
    assert samples == play(8)
    assert len({str(sample) for sample in samples}) == 4  # every rollout has draws of its own


def test_every_request_has_a_seed_of_its_own(chat, workshop):
    """Also when a task comes twice, which small data sets do in one step."""
    sampler = Recorder(chat, lambda prompt: call("echo", text="x"))
    tasks = [task("a"), task("b"), task("a")]
    roll_out(workshop, chat, sampler, tasks, max_turns=2, seed=0, **LIMITS)
    seeds = [request.seed for request in sampler.requests]
    assert len(seeds) == len(set(seeds)) == 3 * 2 * 2
    again = Recorder(chat, lambda prompt: call("echo", text="x"))
    roll_out(workshop, chat, again, tasks, max_turns=2, seed=0, **LIMITS)
    assert sorted(seeds) == sorted(request.seed for request in again.requests)
    other = Recorder(chat, lambda prompt: call("echo", text="x"))
    roll_out(workshop, chat, other, tasks, max_turns=2, seed=1, **LIMITS)
    assert not set(seeds) & {request.seed for request in other.requests}


# --- faults of tools ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("crash", "ZeroDivisionError: the drill broke"),
        ("hang", "gave no result in 0.05 s"),
        ("flood", "5000 characters, the limit is 1000"),
        ("garbled", "invalid UTF-8"),
        ("nothing", "no such tool"),
    ],
)
def test_a_faulty_tool_ends_its_own_call(chat, workshop, name, told):
    """The agent reads the error in its next prompt; its neighbour sees nothing of it."""
    workshop.set_limits(max_turns=4, tool_timeout_s=0.05)

    def say(prompt: str) -> str:
        if prompt.count("assistant") > 1:
            return ANSWER
        return call(name) if "task a" in prompt else call("echo", text="fine")

    sampler = Recorder(chat, say)
    groups = work(chat, workshop, sampler, seed=0, group_size=1)
    (broken,), (whole,) = (group.trajectories for group in groups)
    assert broken.status == whole.status == "finished"
    assert (broken.turns[0].tool_calls, broken.turns[0].tool_successes) == (1, 0)
    assert (whole.turns[0].tool_calls, whole.turns[0].tool_successes) == (1, 1)
    assert told in broken.turns[0].reply and "Error:" in broken.turns[0].reply
    second = [p for p in sampler.prompts if "task a" in p][1]
    assert told in second
    assert broken.outcome == whole.outcome > 0


# --- faults of environments -----------------------------------------------------------------------


class Fragile:
    """An environment that breaks where it is told to: at `start`, `step` or `finish`."""

    tools = ()
    native_calls = False

    def __init__(self, fault, where: str = "step", broken: tuple[str, ...] = ("b",)) -> None:
        self.fault, self.where, self.broken = fault, where, broken
        self.cancelled = 0

    def tasks(self, split):
        return [task(name) for name in "abcdefgh"]

    def episode(self, task):
        return FragileEpisode(self, task)


class FragileEpisode:
    def __init__(self, env: Fragile, task: Task) -> None:
        self._env, self._task = env, task

    async def _break(self, where: str):
        env = self._env
        if where == env.where and self._task.id in env.broken:
            try:
                return await env.fault()
            except asyncio.CancelledError:
                env.cancelled += 1
                raise
        return None

    async def start(self):
        await self._break("start")
        return [{"role": "user", "content": self._task.question}]

    async def step(self, text: str):
        return await self._break("step") or Step(done=True, reward=1.0)

    async def finish(self):
        return await self._break("finish") or Outcome(reward=1.0)


class Blocking:
    """An environment of plain functions, in which task `a` blocks until task `b` has gone on."""

    tools = ()
    native_calls = False

    def __init__(self, patience_s: float = 30.0) -> None:
        self.gate, self.patience_s = threading.Event(), patience_s

    def tasks(self, split):
        return [task("a"), task("b")]

    def episode(self, task):
        return BlockingEpisode(self, task)


class BlockingEpisode:
    def __init__(self, env: Blocking, task: Task) -> None:
        self._env, self._task, self._num_turns = env, task, 0

    def start(self):
        return [{"role": "user", "content": self._task.question}]

    def step(self, text: str) -> Step:
        self._num_turns += 1
        if self._task.id == "a" and not self._env.gate.wait(self._env.patience_s):
            raise ZeroDivisionError("nobody came")
        if self._num_turns == 3:
            self._env.gate.set()
        done = self._task.id == "a" or self._num_turns == 3
        return Step(messages=({"role": "user", "content": "Again."},) * (not done), done=done)

    def finish(self) -> Outcome:
        return Outcome(reward=float(self._num_turns))


@pytest.mark.parametrize("rewards", [(), (Reward(name="one", function=lambda task, turns: 1.0),)])
def test_a_step_that_blocks_delays_its_own_trajectory_alone(chat, rewards):
    env = Blocking()
    env.rewards = rewards
    sampler = Recorder(chat, lambda prompt: "hm")
    limits = {**LIMITS, "max_turns": 4, "group_size": 1}
    groups = roll_out(env, chat, sampler, env.tasks("train"), **limits)
    (a,), (b,) = (group.trajectories for group in groups)
    assert (a.status, len(a.turns), b.status, len(b.turns)) == ("finished", 1, "finished", 3)
    assert (a.outcome, b.outcome) == (1.0 + len(rewards), 3.0 + len(rewards))


@pytest.mark.parametrize(
    ("patience_s", "status", "error"),
    [(0.0, "error", "ZeroDivisionError: nobody came (test_rollout.py:"), (30.0, "timeout", "0.2")],
)
def test_a_step_that_blocks_for_good_ends_its_own_trajectory(chat, patience_s, status, error):
    env = Blocking(patience_s)
    limits = {**LIMITS, "max_turns": 4, "trajectory_timeout_s": 0.2, "max_error_share": 1.0}
    groups = roll_out(env, chat, Recorder(chat, lambda prompt: "hm"), [task("a")], **limits)
    env.gate.set()
    for trajectory in groups[0].trajectories:
        assert trajectory.status == status and error in trajectory.error


async def forever():
    await asyncio.Event().wait()


async def broken():
    raise KeyError("no such page")


async def too_late():
    raise TimeoutError("the wiki did not answer")


async def called_off():
    raise asyncio.CancelledError


def play_fragile(chat, env, *, group_size=1, should_stop=lambda: False, pick=everything, **changed):
    sampler = Recorder(chat, lambda prompt: "hm", pick=pick)
    limits = {**LIMITS, "max_turns": 2, "group_size": group_size, **changed}
    try:
        return roll_out(env, chat, sampler, env.tasks("train"), should_stop=should_stop, **limits)
    finally:
        assert sampler.num_pending == 0


@pytest.mark.parametrize("where", ["start", "step", "finish"])
@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (broken, "KeyError: 'no such page'"),
        (too_late, "TimeoutError: the wiki did not answer"),
        (called_off, "CancelledError"),
    ],
)
def test_an_environment_that_raises_costs_one_trajectory(chat, where, fault, text):
    groups = play_fragile(chat, Fragile(fault, where))
    lone = groups[1].trajectories[0]
    assert lone.status == "error" and text in lone.error and lone.failed
    assert all(g.trajectories[0].status == "finished" for i, g in enumerate(groups) if i != 1)


def paid(where: str, reward):
    async def pay():
        return Step(reward=reward) if where == "step" else Outcome(reward=reward)

    return pay


@pytest.mark.parametrize(
    ("where", "reward", "shown"),
    [
        ("step", float("nan"), "nan"),
        ("step", float("-inf"), "-inf"),
        ("step", 1e300, "1e\\+300"),
        ("step", "0.5", "'0.5'"),
        ("finish", float("inf"), "inf"),
        ("finish", float("nan"), "nan"),
        ("finish", None, "None"),
    ],
)
def test_a_reward_that_is_no_number_costs_one_trajectory(chat, where, reward, shown):
    groups = play_fragile(chat, Fragile(paid(where, reward), where), group_size=2)
    for lone in groups[1].trajectories:
        assert lone.status.is_reward_fault and lone.outcome == 0.0
        assert re.search(f"the environment's .* is {shown}; it must be a finite", lone.error)
        assert all(turn.reward == 1.0 for turn in lone.turns)
    # counted, in no baseline, and the step goes on
    credits = assign_credits(groups)
    assert not credits[1].has_signal
    assert values_of(summarise(groups, credits))["status/reward_error"] == 2 / 16
    with pytest.raises(RolloutError, match=r"2 of 16 .* rollout\.max_error_share"):
        play_fragile(chat, Fragile(paid(where, reward), where), group_size=2, max_error_share=0.1)


def test_a_turn_without_a_reward_is_no_fault(chat):
    groups = play_fragile(chat, Fragile(paid("step", None)))
    assert [turn.reward for turn in groups[1].trajectories[0].turns] == [None, None]
    assert not groups[1].trajectories[0].failed


def test_an_environment_that_never_ends_is_ended(chat):
    """It talks on at once and for ever: the limit of turns ends it, and it is scored as it is."""
    groups = play_fragile(chat, Fragile(paid("step", 0.5)))
    lone = groups[1].trajectories[0]
    assert (lone.status, len(lone.turns), lone.outcome) == ("max_turns", 2, 1.0)


def test_failed_trajectories_are_trained_on_by_nobody(chat):
    groups = play_fragile(chat, Fragile(broken, "finish"), group_size=2)
    assert groups[1].trajectories[0].turns  # it had sampled something
    credits = [Credit(rule="test", advantages=((1.0,), (-1.0,))) for _ in groups]
    packed = pack(groups, credits, budget=512)
    kept = sum(t.num_sampled for g in groups for t in g.trajectories if not t.failed)
    assert packed.num_targets == kept > 0


def test_too_many_failures_end_the_run_and_show_the_first(chat):
    groups = play_fragile(chat, Fragile(broken, broken=("c",)), max_error_share=0.125)
    assert groups[2].trajectories[0].failed
    with pytest.raises(RolloutError) as caught:
        play_fragile(chat, Fragile(broken, broken=("c", "f")), max_error_share=0.125)
    text = str(caught.value)
    assert "2 of 8" in text and "rollout.max_error_share = 0.125" in text
    assert "task 'c'" in text and "no such page" in text


# --- deadlines ------------------------------------------------------------------------------------


def test_a_trajectory_has_a_deadline(chat):
    env = Fragile(forever)
    groups = play_fragile(chat, env, trajectory_timeout_s=0.1)
    lone = groups[1].trajectories[0]
    assert (lone.status, lone.error) == ("timeout", "no end after 0.1 s")
    assert env.cancelled == 1
    assert all(g.trajectories[0].status == "finished" for i, g in enumerate(groups) if i != 1)


def test_a_trajectory_whose_sample_does_not_come_is_aborted(chat):
    never = lambda waiting: [r for r in waiting if "task b" not in chat.decode_turn(r.prompt_ids)]
    groups = play_fragile(chat, Fragile(broken, broken=()), pick=never, trajectory_timeout_s=0.1)
    assert groups[1].trajectories[0].status == "timeout"


def test_a_step_has_a_deadline(chat):
    env = Fragile(forever, broken=("b", "d"))
    with pytest.raises(RolloutError, match=r"rollout\.step_timeout_s: 2 of 8 .* after 0\.1 s"):
        play_fragile(chat, env, step_timeout_s=0.1)
    assert env.cancelled == 2


async def stubborn():
    """Retries whatever happens, its own cancellation included."""
    while True:
        try:
            await asyncio.sleep(60)
        except BaseException:
            continue


def test_an_environment_that_will_not_be_called_off_costs_one_trajectory(chat, monkeypatch):
    monkeypatch.setattr("turnfast.rollout.schedule.CANCEL_GRACE_S", 0.1)
    monkeypatch.setattr("turnfast.rollout.groups.CANCEL_GRACE_S", 0.1)
    groups = play_fragile(chat, Fragile(stubborn), trajectory_timeout_s=0.1)
    lone = groups[1].trajectories[0]
    assert (lone.status, lone.turns, lone.index) == ("timeout", (), 0)
    assert "ignored cancellation" in lone.error
    assert all(g.trajectories[0].status == "finished" for i, g in enumerate(groups) if i != 1)


def test_a_stop_does_not_wait_for_an_environment_that_will_not_be_called_off(chat, monkeypatch):
    monkeypatch.setattr("turnfast.rollout.groups.CANCEL_GRACE_S", 0.1)
    asked = iter(range(3))
    with pytest.raises(Interrupted):
        play_fragile(chat, Fragile(stubborn), should_stop=lambda: next(asked, None) is None)


def test_the_clock_of_a_rollout_starts_with_it(chat):
    """One slot, steps of 50 ms, eight rollouts: the last waits longer than any may take."""

    def slow(waiting):
        time.sleep(0.05)
        return waiting[:1]

    sampler = ScriptedSampler(lambda ids: [chat.end_id], pick=slow, capacity=1)
    env = Fragile(broken, broken=())
    limits = {**LIMITS, "max_turns": 1, "group_size": 1, "trajectory_timeout_s": 0.3}
    groups = roll_out(env, chat, sampler, env.tasks("train"), **limits)
    played = [trajectory for group in groups for trajectory in group.trajectories]
    assert [t.status for t in played] == ["finished"] * 8
    assert max(t.time_s for t in played) < 0.3


def test_a_slot_is_free_for_others_while_a_tool_works(chat, workshop):
    """One slot. The tool of `a` returns only after `b`, which came later, has had its turn."""
    workshop.gate = asyncio.Event()

    def say(prompt: str) -> str:
        if "task b" in prompt:
            workshop.gate.set()
            return ANSWER
        return ANSWER if "open" in prompt else call("wait")

    sampler = Recorder(chat, say)
    sampler.capacity = 1
    groups = work(chat, workshop, sampler, seed=0, group_size=1)
    order = ["a" if "task a" in prompt else "b" for prompt in sampler.prompts]
    assert order == ["a", "b", "a"]
    assert [t.status for group in groups for t in group.trajectories] == ["finished"] * 2


def test_an_async_tool_of_many_awaits_does_not_need_an_engine_step_for_each(chat):
    """Task b awaits 40 times without waiting, beside one whose sample takes many steps of 20 ms."""
    num_steps = 0

    async def busy():
        for _ in range(40):
            await asyncio.sleep(0)

    def pick(waiting):
        nonlocal num_steps
        num_steps += 1
        time.sleep(0.02)
        late = [r for r in waiting if "task a" in chat.decode_turn(r.prompt_ids)]
        others = [r for r in waiting if r not in late]
        return others or (late if num_steps >= 100 else [])

    env = Fragile(busy, where="start")
    groups = play_fragile(chat, env, pick=lambda waiting: pick(waiting))
    slow, busy_one = (groups[i].trajectories[0] for i in (0, 1))
    assert slow.time_s > 1.9 and busy_one.time_s < 0.5


def test_a_full_context_ends_a_trajectory_not_a_run(chat, workshop):
    sampler = Recorder(chat, lambda prompt: call("echo", text="more and more of it"))
    limits = {**LIMITS, "max_turns": 50, "group_size": 1, "max_context": 160}
    groups = roll_out(workshop, chat, sampler, [task("a")], **limits)
    (lone,) = groups[0].trajectories
    assert lone.status == "context_full" and 0 < len(lone.turns) < 50
    assert lone.metrics["answered"] == 0.0 and not lone.failed
    assert all(len(r.prompt_ids) + r.max_new_tokens <= 160 for r in sampler.requests)


@pytest.mark.parametrize("left", [3, 20])
def test_a_turn_that_the_context_cuts_is_no_ordinary_end(chat, left):
    """Also when it is the last turn, or the environment is content with what it got."""
    prompt = chat.open([{"role": "user", "content": "task a"}]).prompt_ids
    sampler = ScriptedSampler(lambda prompt_ids: [65] * 19 + [chat.end_id])
    limits = {**LIMITS, "max_turns": 1, "group_size": 1, "max_context": len(prompt) + left}
    (group,) = roll_out(Fragile(broken, broken=()), chat, sampler, [task("a")], **limits)
    (cut,) = group.trajectories
    assert cut.status == ("context_full" if left == 3 else "finished")
    assert cut.num_sampled == min(left, 20) and not cut.failed and cut.outcome == 1.0


@pytest.mark.parametrize("room", [-3, 0])
def test_a_prompt_that_never_fits_is_an_error(chat, room):
    """Also one that fills the context to the last token."""
    size = len(chat.open([{"role": "user", "content": "task a"}]).prompt_ids)
    told = rf"prompt has {size} tokens.*max_context = {size + room}"
    sampler = Recorder(chat, lambda prompt: ANSWER)
    limits = {**LIMITS, "max_turns": 2, "max_context": size + room}
    with pytest.raises(RolloutError, match=told):
        roll_out(Fragile(broken, broken=()), chat, sampler, [task("a")], **limits)


# --- stops ----------------------------------------------------------------------------------------


def test_a_stop_while_all_wait_for_their_tools(chat):
    env = Fragile(forever, broken=tuple("abcdefgh"))
    begin = time.perf_counter()
    asked = iter(range(3))
    with pytest.raises(Interrupted):
        play_fragile(chat, env, should_stop=lambda: next(asked, None) is None)
    assert env.cancelled == 8  # nobody is left behind
    assert time.perf_counter() - begin < 30


def test_a_stop_while_the_sampler_is_busy(chat):
    asked = iter(range(5))
    with pytest.raises(Interrupted):
        play_fragile(
            chat,
            Fragile(broken, broken=()),
            pick=lambda waiting: [],
            should_stop=lambda: next(asked, None) is None,
        )


def test_a_stop_while_tools_hang_in_threads(chat, workshop):
    asked = iter(range(4))
    sampler = Recorder(chat, lambda prompt: call("hang"))
    with pytest.raises(Interrupted):
        work(chat, workshop, sampler, should_stop=lambda: next(asked, None) is None)
    assert sampler.num_pending == 0 and len(sampler.requests) == 4


def test_a_sampler_that_breaks_ends_the_rollout(chat):
    env = Fragile(forever)

    def fail(waiting):
        if len(waiting) < 8:
            raise ValueError("the engine died")
        return waiting[:1]

    with pytest.raises(ValueError, match="the engine died"):
        play_fragile(chat, env, pick=fail)


# --- what became of the time ---------------------------------------------------------------------


def usage_of(chat, env, sampler, size: int):
    tasks = [task(name) for name in "abcdefghijklmnop"[:size]]
    setup = RolloutSetup(
        env=env,
        chat=chat,
        sampler=sampler,
        config=RolloutConfig(**{**LIMITS, "group_size": 1}),
        max_turns=1,
        seed=0,
    )
    prompts = (Prompt(place=i, task=each) for i, each in enumerate(tasks))
    return collect_groups(setup, prompts, Quota(wanted=size, most=size)).usage


def test_utilisation_is_of_the_slots_there_are_rollouts_for(chat):
    """One reply per step: 4, 3, 2, 1 requests, of which two run at a time."""

    def usage(capacity: int):
        sampler = ScriptedSampler(lambda ids: [chat.end_id], pick=oldest, capacity=capacity)
        return usage_of(chat, Fragile(broken, broken=()), sampler, 4)

    assert usage(2).utilisation.value == (2 + 2 + 2 + 1) / (4 * 2)
    assert usage(100).utilisation.value == (4 + 3 + 2 + 1) / (4 * 4)
    assert usage(1).utilisation.value == 1.0


@pytest.mark.parametrize(("slow", "tail"), [("ab", True), ("abcdef", False)])
def test_waiting_for_the_last_is_the_tail(chat, slow, tail):
    async def doze():
        await asyncio.sleep(0.4)

    sampler = ScriptedSampler(lambda ids: [chat.end_id])
    usage = usage_of(chat, Fragile(doze, broken=tuple(slow)), sampler, 16)
    assert usage.time_s >= 0.4 and usage.tool_wait.value >= 0.5
    assert usage.tail.value >= 0.5 if tail else usage.tail.value <= 0.1


# --- identity -------------------------------------------------------------------------------------


class Babel:
    """Answers with random text, special-token look-alikes included."""

    tools = ()
    native_calls = False

    def __init__(self, replies: list[str]) -> None:
        self._replies = replies

    def tasks(self, split):
        return [task("a"), task("b")]

    def episode(self, task):
        return BabelEpisode(self._replies)


class BabelEpisode:
    def __init__(self, replies: list[str]) -> None:
        self._replies = iter(replies)

    async def start(self):
        return [{"role": "user", "content": next(self._replies)}]

    async def step(self, text: str):
        reply = next(self._replies, None)
        if reply is None:
            return Step(done=True)
        return Step(messages=({"role": "user", "content": reply},))

    async def finish(self):
        return Outcome()


REPLY = st.one_of(
    st.text(max_size=10),
    st.sampled_from(["", "<|im_end|>", "<|im_start|>assistant\n", "<|endoftext|>", "é𝄞\u202e"]),
)


def contexts(batch) -> list[tuple[int, tuple[int, ...], int, float]]:
    """(trajectory, ids that a target sees, target, sampler's log-prob), for every target."""
    found = []
    tokens = batch.tokens_T.tolist()
    if batch.ends_T is None:
        edges = list(pairwise(batch.cu_seqlens.tolist()))
    for n, row in enumerate(batch.rows_N.tolist()):
        if batch.ends_T is None:
            first = next(begin for begin, end in edges if begin <= row < end)
            seen = tokens[first : row + 1]
        else:
            ends = batch.ends_T.tolist()
            seen = [tokens[t] for t in range(row + 1) if ends[t] > row]
        trajectory = int(batch.sequences_K[batch.turns_N[n]])
        logprob = float(batch.sampler_logprobs_N[n])
        found.append((trajectory, tuple(seen), int(batch.targets_N[n]), round(logprob, 4)))
    return found


@settings(max_examples=40, deadline=None)
@given(
    replies=st.lists(REPLY, min_size=1, max_size=4),
    seed=st.integers(0, 2**32),
    share_prefixes=st.booleans(),
)
def test_what_is_trained_is_what_was_sampled(chat, replies, seed, share_prefixes):
    """From the sampler's requests and answers to the micro-batches, nothing is encoded anew."""

    def reply(request):
        draw = random.Random(f"{seed} {request.prompt_ids}")
        body = [draw.randrange(3, 300) for _ in range(draw.randrange(0, 6))]
        return body + [chat.end_id] * (draw.random() < 0.8 or not body)

    sampled = []

    def score(request, sampled_ids):
        prompt_ids = request.prompt_ids
        logprobs = [-0.25 * (1 + i + len(prompt_ids) % 7) for i in range(len(sampled_ids))]
        sampled.append((prompt_ids, sampled_ids, logprobs))
        return logprobs

    env = Babel(replies)
    sampler = ScriptedSampler(reply, score=score, pick=shuffled(seed))
    limits = {**LIMITS, "max_turns": 3, "seed": seed}
    groups = roll_out(env, chat, sampler, env.tasks("train"), **limits)
    credits = [
        Credit(
            rule="test",
            advantages=tuple(tuple(1.0 + k for k in range(len(t.turns))) for t in g.trajectories),
        )
        for g in groups
    ]
    packed = pack(groups, credits, budget=512, options=PackOptions(share_prefixes=share_prefixes))
    trained = [item for batch in packed.batches for item in contexts(batch)]
    expected = sorted(
        (prompt_ids + ids[:i], ids[i], round(logprobs[i], 4))
        for prompt_ids, ids, logprobs in sampled
        for i in range(len(ids))
    )
    assert sorted(item[1:] for item in trained) == expected
    trajectories = [t for group in groups for t in group.trajectories]
    for i, trajectory in enumerate(trajectories):
        told = [target for number, _, target, _ in trained if number == i]
        assert told == [token for turn in trajectory.turns for token in turn.sampled_ids]
