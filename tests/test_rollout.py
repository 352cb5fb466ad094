"""Rollouts with a scripted sampler: order, faults, deadlines, stops, limits and token identity."""

from __future__ import annotations

import asyncio
import random
import re
import threading
import time
from dataclasses import replace
from itertools import pairwise

import pytest
from by_script import EnvOf, roll_out, setup_of
from hypothesis import given, settings
from hypothesis import strategies as st
from templates import DROPS_REASONING
from training_runs import stop_after
from transformers import AutoModelForCausalLM, AutoTokenizer

from turnfast.chat.template import Chat
from turnfast.credit import assign_credits
from turnfast.envs import Outcome, Reward, Step, Task, ToolEnv, tool
from turnfast.errors import Interrupted, RolloutError
from turnfast.metrics.reduce import values_of
from turnfast.metrics.rollouts import summarise
from turnfast.packing.options import PackOptions
from turnfast.packing.pack import pack
from turnfast.rollout.groups import collect_groups
from turnfast.rollout.schedule import Prompt, Quota, RolloutScheduler
from turnfast.sampler.awaited import AwaitedSampler
from turnfast.sampler.local import LocalSampler
from turnfast.sampler.scripted import ScriptedSampler, everything, shuffled
from turnfast.types import Credit, Status, Trajectory

ANSWER = "<answer>done</answer>"


def call(name: str, **args: str) -> str:
    inner = ", ".join(f'"{key}": "{value}"' for key, value in args.items())
    return f'<tool>{{"name": "{name}", "args": {{{inner}}}}}</tool>'


def task(name: str) -> Task:
    return Task(id=name, question=f"task {name}", answers=("done",))


class Recorder(ScriptedSampler):
    """Records every request and its decoded prompt."""

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
    """Tools that work and tools that fail in every way."""

    def __init__(self, **options) -> None:
        super().__init__(instructions="", max_result_chars=1000, **options)
        self.gate: asyncio.Event | None = None
        self.release = threading.Event()

    def tasks(self, split):
        return [task("a"), task("b")]

    @tool
    def echo(self, text: str) -> str:
        """Return the text."""
        return text

    @tool
    async def wait(self) -> str:
        """Wait for the gate."""
        assert self.gate is not None
        await self.gate.wait()
        return "open"

    @tool
    def hang(self) -> str:
        """Block a thread."""
        self.release.wait(30)
        return "late"

    @tool
    def crash(self) -> str:
        """Raise."""
        raise ZeroDivisionError("broken")

    @tool
    def flood(self) -> str:
        """Return too much text."""
        return "x" * 5000

    @tool
    def garbled(self) -> str:
        """Return invalid UTF-8."""
        return b"\xff\xfe".decode("utf-8", errors="surrogateescape")


@pytest.fixture
def workshop():
    env = Workshop()
    env.set_limits(max_turns=4, tool_timeout_s=30.0)
    yield env
    env.release.set()


def without_times(groups):
    return [
        replace(group, trajectories=tuple(replace(t, time_s=0.0) for t in group.trajectories))
        for group in groups
    ]


@pytest.mark.parametrize("capacity", [1, 100])
def test_a_slow_tool_delays_its_own_trajectory_alone(chat, workshop, capacity):
    """The tool of `a` returns only after the fourth request of `b`: with lock step, or with a slot
    in use while its tool runs, it never would."""
    workshop.gate = asyncio.Event()

    def say(prompt: str) -> str:
        if "task a" in prompt:
            return ANSWER if "open" in prompt else call("wait")
        if prompt.count("assistant") == 4:
            workshop.gate.set()
            return ANSWER
        return call("echo", text="b")

    sampler = Recorder(chat, say)
    sampler.capacity = capacity
    groups = roll_out(workshop, chat, sampler, group_size=1)
    order = ["a" if "task a" in prompt else "b" for prompt in sampler.prompts]
    assert order == ["a", "b", "b", "b", "b", "a"]
    assert [t.status for group in groups for t in group.trajectories] == ["finished"] * 2
    assert [len(t.turns) for group in groups for t in group.trajectories] == [2, 4]


def oldest(waiting):
    return waiting[:1]


@pytest.mark.parametrize("pick", [oldest, lambda waiting: waiting[-1:], shuffled(1), shuffled(2)])
def test_the_order_of_completion_does_not_change_the_groups(chat, workshop, pick):
    def say(prompt: str) -> str:
        depth = prompt.count("assistant")
        return ANSWER if depth > 2 else call("echo", text=f"{depth} {len(prompt)}")

    def play(pick):
        sampler = Recorder(chat, say, pick=pick)
        groups = roll_out(workshop, chat, sampler, seed=3)
        seeds = {(request.prompt_ids, request.seed) for request in sampler.requests}
        assert sampler.num_pending == 0
        return without_times(groups), seeds

    assert play(pick) == play(everything)


@pytest.mark.parametrize("num_slots", [1, 3, 16])
def test_the_batch_size_does_not_change_the_samples(tiny_folder, chat, workshop, num_slots):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)

    def play(slots: int):
        sampler = LocalSampler(model, stop_ids=chat.stop_ids, num_slots=slots, max_context=480)
        env = Workshop(missing_answer="remind")
        limits = {"max_new_tokens": 6, "max_context": 480, "max_turns": 3, "seed": 5}
        groups = roll_out(env, chat, sampler, **limits)
        return [
            [turn.sampled_ids for turn in t.turns] for group in groups for t in group.trajectories
        ]

    samples = play(num_slots)
    assert samples == play(8)
    assert len({str(sample) for sample in samples}) == 4  # different in every rollout


def test_every_request_has_its_own_seed(chat, workshop):
    """Also when a step contains a task twice, as with small data sets."""

    def seeds_of(seed: int) -> list[int]:
        sampler = Recorder(chat, lambda prompt: call("echo", text="x"))
        tasks = [task("a"), task("b"), task("a")]
        roll_out(workshop, chat, sampler, tasks, max_turns=2, seed=seed)
        return sorted(request.seed for request in sampler.requests)

    seeds = seeds_of(0)
    assert len(seeds) == len(set(seeds)) == 3 * 2 * 2
    assert seeds_of(0) == seeds and not set(seeds) & set(seeds_of(1))


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("crash", "ZeroDivisionError: broken"),
        ("hang", "gave no result in 0.05 s"),
        ("flood", "5000 characters, the limit is 1000"),
        ("garbled", "invalid UTF-8"),
        ("nothing", "no such tool"),
    ],
)
def test_a_failed_tool_ends_its_own_call(chat, workshop, name, error):
    """The agent sees the error in its next prompt; other trajectories do not."""
    workshop.set_limits(max_turns=4, tool_timeout_s=0.05)

    def say(prompt: str) -> str:
        if prompt.count("assistant") > 1:
            return ANSWER
        return call(name) if "task a" in prompt else call("echo", text="fine")

    sampler = Recorder(chat, say)
    groups = roll_out(workshop, chat, sampler, group_size=1)
    (failing,), (working,) = (group.trajectories for group in groups)
    assert failing.status == working.status == "finished"
    assert (failing.turns[0].tool_calls, failing.turns[0].tool_successes) == (1, 0)
    assert (working.turns[0].tool_calls, working.turns[0].tool_successes) == (1, 1)
    assert error in failing.turns[0].reply and "Error:" in failing.turns[0].reply
    second = [p for p in sampler.prompts if "task a" in p][1]
    assert error in second
    assert failing.outcome == working.outcome > 0


class Fragile(EnvOf):
    """Calls `fault` in `start`, `step` or `finish` of the tasks in `broken`."""

    def __init__(self, fault=None, where: str = "step", broken: str = "b") -> None:
        super().__init__(self.start, [task(name) for name in "abcdefgh"])
        self.fault, self.where = fault, where
        self.broken = broken if fault else ""
        self.cancelled = 0
        self.started: list[str] = []

    def start(self, task):
        self.started.append(task.id)
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


class Blocking(EnvOf):
    """Plain functions; task `a` blocks until task `b` has had three turns."""

    def __init__(self, wait_s: float = 30.0) -> None:
        super().__init__(lambda task: BlockingEpisode(self, task), [task("a"), task("b")])
        self.gate, self.wait_s = threading.Event(), wait_s


class BlockingEpisode:
    def __init__(self, env: Blocking, task: Task) -> None:
        self._env, self._task, self._num_turns = env, task, 0

    def start(self):
        return [{"role": "user", "content": self._task.question}]

    def step(self, text: str) -> Step:
        self._num_turns += 1
        if self._task.id == "a" and not self._env.gate.wait(self._env.wait_s):
            raise ZeroDivisionError("timed out")
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
    groups = roll_out(env, chat, sampler, group_size=1)
    (a,), (b,) = (group.trajectories for group in groups)
    assert (a.status, len(a.turns), b.status, len(b.turns)) == ("finished", 1, "finished", 3)
    assert (a.outcome, b.outcome) == (1.0 + len(rewards), 3.0 + len(rewards))


@pytest.mark.parametrize(
    ("wait_s", "status", "error"),
    [(0.0, "error", "ZeroDivisionError: timed out (test_rollout.py:"), (30.0, "timeout", "0.2")],
)
def test_a_step_that_blocks_forever_ends_its_own_trajectory(chat, wait_s, status, error):
    env = Blocking(wait_s)
    limits = {"trajectory_timeout_s": 0.2, "max_error_share": 1.0}
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


async def cancelled():
    raise asyncio.CancelledError


def play_fragile(chat, env, *, pick=everything, should_stop=lambda: False, **limits):
    sampler = Recorder(chat, lambda prompt: "hm", pick=pick)
    limits = {"max_turns": 2, "group_size": 1, **limits}
    try:
        return roll_out(env, chat, sampler, should_stop=should_stop, **limits)
    finally:
        assert sampler.num_pending == 0


def trajectory_of_b(groups) -> Trajectory:
    """The first one; those of the other tasks have finished."""
    others = [t for i, group in enumerate(groups) if i != 1 for t in group.trajectories]
    assert {t.status for t in others} == {"finished"}
    return groups[1].trajectories[0]


@pytest.mark.parametrize("where", ["start", "step", "finish"])
@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (broken, "KeyError: 'no such page'"),
        (too_late, "TimeoutError: the wiki did not answer"),
        (cancelled, "CancelledError"),
    ],
)
def test_an_environment_that_raises_costs_one_trajectory(chat, where, fault, text):
    failed = trajectory_of_b(play_fragile(chat, Fragile(fault, where)))
    assert failed.status == "error" and text in failed.error and failed.failed


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
    for failed in groups[1].trajectories:
        assert failed.status.is_reward_fault and failed.outcome == 0.0
        assert re.search(f"the environment's .* is {shown}; it must be a finite", failed.error)
        assert all(turn.reward == 1.0 for turn in failed.turns)
    # counted, but not part of a baseline
    credits = assign_credits(groups)
    assert not credits[1].has_signal
    assert values_of(summarise(groups, credits))["status/reward_error"] == 2 / 16


@pytest.mark.parametrize("reward", [None, 0.5])
def test_max_turns_ends_a_trajectory_and_it_is_scored(chat, reward):
    ended = trajectory_of_b(play_fragile(chat, Fragile(paid("step", reward))))
    assert (ended.status, ended.outcome, ended.failed) == ("max_turns", 1.0, False)
    assert [turn.reward for turn in ended.turns] == [reward, reward]


def test_failed_trajectories_are_not_trained_on(chat):
    groups = play_fragile(chat, Fragile(broken, "finish"), group_size=2)
    assert groups[1].trajectories[0].turns
    credits = [Credit(rule="test", advantages=((1.0,), (-1.0,))) for _ in groups]
    packed = pack(groups, credits, budget=512)
    kept = sum(t.num_sampled for g in groups for t in g.trajectories if not t.failed)
    assert packed.num_targets == kept > 0


def test_too_many_failures_end_the_run_and_show_the_first(chat):
    play_fragile(chat, Fragile(broken), max_error_share=0.125)
    first = r"2 of 8 .* rollout\.max_error_share = 0\.125 .* task 'c': KeyError: 'no such page'"
    with pytest.raises(RolloutError, match=first):
        play_fragile(chat, Fragile(broken, broken="cf"), max_error_share=0.125)


def test_a_trajectory_has_a_deadline(chat):
    env = Fragile(forever)
    late = trajectory_of_b(play_fragile(chat, env, trajectory_timeout_s=0.1))
    assert (late.status, late.error) == ("timeout", "no end after 0.1 s")
    assert env.cancelled == 1


def test_a_trajectory_whose_request_does_not_finish_times_out(chat):
    never = lambda waiting: [r for r in waiting if "task b" not in chat.decode_turn(r.prompt_ids)]
    groups = play_fragile(chat, Fragile(), pick=never, trajectory_timeout_s=0.1)
    assert trajectory_of_b(groups).status == "timeout"


def test_a_step_has_a_deadline(chat):
    env = Fragile(forever, broken="bd")
    with pytest.raises(RolloutError, match=r"rollout\.step_timeout_s: 2 of 8 .* after 0\.1 s"):
        play_fragile(chat, env, step_timeout_s=0.1)
    assert env.cancelled == 2


async def uncancellable():
    """Retries after every exception, its own cancellation included."""
    while True:
        try:
            await asyncio.sleep(60)
        except BaseException:
            continue


@pytest.fixture
def short_grace(monkeypatch):
    monkeypatch.setattr("turnfast.rollout.schedule.CANCEL_GRACE_S", 0.1)
    monkeypatch.setattr("turnfast.rollout.groups.CANCEL_GRACE_S", 0.1)


@pytest.mark.usefixtures("short_grace")
def test_an_environment_that_ignores_cancellation_costs_one_trajectory(chat):
    env = Fragile(uncancellable)
    late = trajectory_of_b(play_fragile(chat, env, trajectory_timeout_s=0.1))
    assert (late.status, late.turns, late.index) == ("timeout", (), 0)
    assert "ignored cancellation" in late.error


@pytest.mark.usefixtures("short_grace")
@pytest.mark.parametrize(
    ("fault", "broken", "pick"),
    [
        pytest.param(forever, "abcdefgh", everything, id="all-wait-for-tools"),
        pytest.param(None, "", lambda waiting: [], id="the-sampler-is-busy"),
        pytest.param(uncancellable, "b", everything, id="cancellation-is-ignored"),
    ],
)
def test_a_stop_ends_the_rollout(chat, fault, broken, pick):
    env = Fragile(fault, broken=broken)
    with pytest.raises(Interrupted):
        play_fragile(chat, env, pick=pick, should_stop=stop_after(4))
    assert env.cancelled == (8 if fault is forever else 0)


def test_a_stop_while_tools_block_threads(chat, workshop):
    sampler = Recorder(chat, lambda prompt: call("hang"))
    with pytest.raises(Interrupted):
        roll_out(workshop, chat, sampler, should_stop=stop_after(4))
    assert sampler.num_pending == 0 and len(sampler.requests) == 4


def test_the_timeout_of_a_rollout_begins_at_its_start(chat):
    """One slot, steps of 50 ms, eight rollouts: the last one queues for longer than the timeout."""

    def slow(waiting):
        time.sleep(0.05)
        return waiting

    sampler = ScriptedSampler(lambda request: [chat.end_id], pick=slow, capacity=1)
    groups = roll_out(Fragile(), chat, sampler, group_size=1, trajectory_timeout_s=0.3)
    played = [trajectory for group in groups for trajectory in group.trajectories]
    assert [t.status for t in played] == ["finished"] * 8
    assert max(t.time_s for t in played) < 0.3


def test_an_async_tool_with_many_awaits_does_not_need_an_engine_step_for_each(chat):
    """Task b awaits 40 times without waiting, while a request of a takes many steps of 20 ms."""
    num_steps = 0

    async def busy():
        for _ in range(40):
            await asyncio.sleep(0)

    def pick(waiting):
        nonlocal num_steps
        num_steps += 1
        time.sleep(0.02)
        others = [r for r in waiting if "task a" not in chat.decode_turn(r.prompt_ids)]
        return others or (waiting if num_steps >= 100 else [])

    groups = play_fragile(chat, Fragile(busy, where="start"), pick=pick)
    assert groups[0].trajectories[0].time_s > 1.9 and trajectory_of_b(groups).time_s < 0.5


def test_a_full_context_ends_the_trajectory(chat, workshop):
    sampler = Recorder(chat, lambda prompt: call("echo", text="more and more of it"))
    limits = {"max_turns": 50, "group_size": 1, "max_context": 160}
    (group,) = roll_out(workshop, chat, sampler, [task("a")], **limits)
    (ended,) = group.trajectories
    assert ended.status == "context_full" and 0 < len(ended.turns) < 50
    assert ended.metrics["answered"] == 0.0 and not ended.failed
    assert all(len(r.prompt_ids) + r.max_new_tokens <= 160 for r in sampler.requests)


@pytest.mark.parametrize("left", [3, 20])
def test_a_turn_that_the_context_cuts_ends_as_context_full(chat, left):
    """Also when it is the last turn, or the environment ends the trajectory."""
    prompt = chat.open([{"role": "user", "content": "task a"}]).prompt_ids
    sampler = ScriptedSampler(lambda request: [65] * 19 + [chat.end_id])
    limits = {"max_turns": 1, "group_size": 1, "max_context": len(prompt) + left}
    (group,) = roll_out(Fragile(), chat, sampler, [task("a")], **limits)
    (cut,) = group.trajectories
    assert cut.status == ("context_full" if left == 3 else "finished")
    assert cut.num_sampled == min(left, 20) and not cut.failed and cut.outcome == 1.0


@pytest.mark.parametrize("left", [-3, 0])
def test_a_first_prompt_that_does_not_fit_is_an_error(chat, left):
    """Also one that fills the context exactly."""
    size = len(chat.open([{"role": "user", "content": "task a"}]).prompt_ids)
    text = rf"prompt has {size} tokens.*max_context = {size + left}"
    sampler = Recorder(chat, lambda prompt: ANSWER)
    with pytest.raises(RolloutError, match=text):
        roll_out(Fragile(), chat, sampler, [task("a")], max_context=size + left)


def test_an_error_of_the_sampler_ends_the_rollout(chat):
    def fail(waiting):
        if len(waiting) < 8:
            raise ValueError("the engine died")
        return waiting[:1]

    with pytest.raises(ValueError, match="the engine died"):
        play_fragile(chat, Fragile(forever), pick=fail)


def collect(chat, env, sampler, names: str, quota: Quota):
    """Groups of one rollout of one turn."""
    prompts = (Prompt(place=place, task=task(name)) for place, name in enumerate(names))
    setup = setup_of(env, chat, sampler, group_size=1, max_turns=1)
    return collect_groups(setup, prompts, quota)


def test_utilisation_counts_the_slots_that_rollouts_could_use(chat):
    """One reply per step: 4, 3, 2, 1 requests, of which two run at a time."""

    def usage(capacity: int):
        sampler = ScriptedSampler(lambda request: [chat.end_id], pick=oldest, capacity=capacity)
        return collect(chat, Fragile(), sampler, "abcd", Quota(wanted=4, most=4)).usage

    assert usage(2).utilisation.value == (2 + 2 + 2 + 1) / (4 * 2)
    assert usage(100).utilisation.value == (4 + 3 + 2 + 1) / (4 * 4)
    assert usage(1).utilisation.value == 1.0


@pytest.mark.parametrize(("slow", "tail"), [("ab", True), ("abcdef", False)])
def test_the_tail_is_the_time_with_few_rollouts(chat, slow, tail):
    async def doze():
        await asyncio.sleep(0.4)

    sampler = ScriptedSampler(lambda request: [chat.end_id])
    env = Fragile(doze, broken=slow)
    usage = collect(chat, env, sampler, "abcdefghijklmnop", Quota(wanted=16, most=16)).usage
    assert usage.time_s >= 0.4 and usage.tool_wait.value >= 0.5
    assert usage.tail.value >= 0.5 if tail else usage.tail.value <= 0.1


def replies_env(replies: list[str]) -> EnvOf:
    """Starts with the first text, replies with the others and ends after the last."""
    return EnvOf(lambda task: RepliesEpisode(replies), [task("a"), task("b")])


class RepliesEpisode:
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
    targets = []
    tokens = batch.tokens_T.tolist()
    for n, row in enumerate(batch.rows_N.tolist()):
        if batch.ends_T is None:
            edges = pairwise(batch.cu_seqlens.tolist())
            first = next(begin for begin, end in edges if begin <= row < end)
            seen = tokens[first : row + 1]
        else:
            ends = batch.ends_T.tolist()
            seen = [tokens[t] for t in range(row + 1) if ends[t] > row]
        trajectory = int(batch.sequences_K[batch.turns_N[n]])
        logprob = float(batch.sampler_logprobs_N[n])
        targets.append((trajectory, tuple(seen), int(batch.targets_N[n]), round(logprob, 4)))
    return targets


def test_a_template_that_rewrites_history_restarts_the_context(tiny_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = DROPS_REASONING
    chat = Chat(tokenizer)
    texts = iter(["<think>hm</think>Ida", "Oslo", "Ulm"])
    sampler = Recorder(chat, lambda prompt: next(texts))
    limits = {"group_size": 1, "max_new_tokens": 300, "max_context": 300}
    env = replies_env(["Who?", "Sure?", "Really?"])
    (group,) = roll_out(env, chat, sampler, [task("a")], **limits)
    first, second, third = group.trajectories[0].turns
    assert [turn.restart for turn in (first, second, third)] == [False, True, False]
    assert [request.prompt_ids for request in sampler.requests] == [
        first.prompt_ids,
        second.prompt_ids,
        second.prompt_ids + second.sampled_ids + third.prompt_ids,
    ]
    assert "hm" not in sampler.prompts[1] and "Who?" in sampler.prompts[1]
    # the free part of the context
    for request in sampler.requests:
        assert request.max_new_tokens == 300 - len(request.prompt_ids)


@pytest.mark.parametrize(("last_is_cut", "status"), [(False, "finished"), (True, "length")])
def test_a_turn_cut_at_max_new_tokens_is_followed_by_the_next(chat, last_is_cut, status):
    too_long, short = [65] * 100, [65, chat.end_id]
    replies = iter([too_long, too_long if last_is_cut else short])
    sampler = ScriptedSampler(lambda request: next(replies))
    env = replies_env(["Who?", "Go on."])
    (group,) = roll_out(env, chat, sampler, [task("a")], group_size=1, max_new_tokens=20)
    (trajectory,) = group.trajectories
    first, second = trajectory.turns
    assert first.finish == "length" and len(first.sampled_ids) == 20
    assert second.prompt_ids[0] == chat.end_id  # appended, not sampled
    assert trajectory.status == status and not trajectory.failed


def test_rollouts_of_dropped_groups_do_not_start(chat):
    """One slot: the group of `a` fills the quota while the group of `b` is queued."""
    env = Fragile()
    sampler = ScriptedSampler(lambda request: [chat.end_id], capacity=1)
    collected = collect(chat, env, sampler, "ab", Quota(wanted=1, ahead=1, most=2))
    assert [group.task.id for group in collected.groups] == ["a"]
    assert [prompt.task.id for prompt in collected.dropped] == ["b"]
    assert env.started == ["a"]


def test_a_late_end_does_not_replace_a_timeout(monkeypatch):
    """Rollout 0 ends after the scheduler gave it up, while its group waits for rollout 1."""
    monkeypatch.setattr("turnfast.rollout.schedule.CANCEL_GRACE_S", 0.5)

    async def run():
        release = asyncio.Event()

        async def play(prompt, index, deadline):
            while not release.is_set():
                try:
                    await release.wait()
                except asyncio.CancelledError:
                    continue
            return Trajectory(task_id="a", index=index, turns=(), status=Status.FINISHED)

        sampler = ScriptedSampler(lambda request: [], capacity=1)  # one start per update
        scheduler = RolloutScheduler(
            iter([Prompt(place=0, task=task("a"))]),
            Quota(wanted=1, most=1),
            AwaitedSampler(sampler),
            play,
            size=2,
            counts=lambda group: True,
            timeout_s=0.05,
        )
        await scheduler.update()
        await asyncio.sleep(0.4)  # so that rollout 1 is given up 0.4 s later than rollout 0
        while scheduler.num_unfinished == 2:
            await scheduler.update()
            await asyncio.sleep(0.01)
        release.set()
        while await scheduler.update():
            await asyncio.sleep(0.01)
        return scheduler.groups

    (group,) = asyncio.run(run())
    assert [t.status for t in group.trajectories] == ["timeout", "finished"]


@settings(max_examples=40, deadline=None)
@given(
    replies=st.lists(REPLY, min_size=1, max_size=4),
    seed=st.integers(0, 2**32),
    share_prefixes=st.booleans(),
)
def test_exactly_the_sampled_ids_are_trained(chat, replies, seed, share_prefixes):
    """Between the sampler and the micro-batches no text is encoded again."""

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

    sampler = ScriptedSampler(reply, score=score, pick=shuffled(seed))
    groups = roll_out(replies_env(replies), chat, sampler, max_turns=3, seed=seed)
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
        targets = [target for number, _, target, _ in trained if number == i]
        assert targets == [token for turn in trajectory.turns for token in turn.sampled_ids]
