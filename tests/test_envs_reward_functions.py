"""Reward functions: their arguments, weights, faults, and how a recipe selects them."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from dataclasses import replace

import by_script
import numpy
import pytest

from turnfast.config.recipe import load_config, to_toml
from turnfast.config.schema import RewardConfig
from turnfast.credit import assign_credit
from turnfast.envs import Reward, RewardFault, Task, ToolEnv, check_reward, load_env, tool
from turnfast.envs.rewards.builtin import load_rewards
from turnfast.errors import ConfigError, RolloutError
from turnfast.metrics.reduce import values_of
from turnfast.metrics.rollouts import summarise
from turnfast.sampler.scripted import ScriptedSampler

TASK = Task(
    id="q", question="Who wrote Ulm?", answers=("Ida",), data={"supporting_titles": ("Ulm", "Rom")}
)
ANSWER = "<answer>Ida</answer>"


class Books(ToolEnv):
    def __init__(self, *rewards: Reward) -> None:
        super().__init__(instructions="", weights={"tool_executed": 0.0, "answer_in_result": 0.0})
        self.rewards = (*self.rewards, *rewards)

    def tasks(self, split):
        return [TASK]

    @tool
    def search(self, query: str) -> str:
        """Find one passage."""
        return {"Ulm": "Ulm: by Ida.", "Rom": "Rom: by Ole."}.get(query, "")


def call(query: str) -> str:
    return f'<tool>{{"name": "search", "args": {{"query": "{query}"}}}}</tool>'


def play(env, *texts):
    return by_script.play(env, TASK, *texts)[1:]


def num_words(task, turns) -> float:
    return len(turns[-1].text.split())


async def num_turns(task, turns) -> float:
    await asyncio.sleep(0)
    return float(len(turns))


def test_plain_and_async_rewards_are_weighted_and_added():
    env = Books(
        Reward(name="words", function=num_words, on="turn", weight=-0.5),
        Reward(name="calls", function=num_turns, on="call", weight=0.25),
        Reward(name="length", function=num_turns, on="outcome", weight=2.0),
    )
    default_steps, default = play(Books(), call("Ulm"), ANSWER)
    (first, second), outcome = play(env, call("Ulm"), ANSWER)
    added = {"words": -0.5 * len(call("Ulm").split()), "calls": 0.25}
    assert first.reward_parts == {**default_steps[0].reward_parts, **added}
    assert first.reward == pytest.approx(sum(first.reward_parts.values()))
    assert (second.reward, second.reward_parts) == (-0.5, {"words": -0.5})
    assert outcome.reward == pytest.approx(default.reward + 4.0)
    assert outcome.reward_parts == {**default.reward_parts, "length": 4.0}
    assert (first.messages, second.done) == (default_steps[0].messages, True)


class Changed(Books):
    """`Books` with changes to the environment's own step or outcome."""

    def __init__(self, method: str, change: dict, *rewards: Reward) -> None:
        super().__init__(*rewards)
        self._method, self._change = method, change

    def episode(self, task):
        episode = super().episode(task)
        original = getattr(episode, self._method)

        async def changed(*args):
            return replace(await original(*args), **self._change)

        setattr(episode, self._method, changed)
        return episode


@pytest.mark.parametrize("num_added", [0, 1])
@pytest.mark.parametrize(
    ("method", "own", "kind"),
    [
        ("step", "1.0", "not_a_number"),
        ("step", math.nan, "not_finite"),
        ("finish", None, "missing"),
        ("finish", "1.0", "not_a_number"),
        ("finish", math.nan, "not_finite"),
    ],
)
def test_the_environments_own_rewards_are_checked(method, own, kind, num_added):
    added = [Reward(name="length", function=num_turns, on="turn")] * num_added
    with pytest.raises(RewardFault, match="the environment's") as fault:
        play(Changed(method, {"reward": own}, *added), ANSWER)
    assert fault.value.kind == kind


def test_rewards_are_added_to_a_turn_without_reward():
    length = Reward(name="length", function=num_turns, on="turn", weight=2.0)
    for added, total in (([], None), ([length], 2.0)):
        (step,), _ = play(Changed("step", {"reward": None}, *added), ANSWER)
        assert step.reward == total


@pytest.mark.parametrize(("method", "on"), [("step", "turn"), ("finish", "outcome")])
def test_reward_parts_need_different_names(method, on):
    reward = Reward(name="length", function=num_turns, on=on)
    own_part = {"reward_parts": {"length": 1.0}}
    for env in (Changed(method, own_part, reward), Books(reward, reward)):
        with pytest.raises(ConfigError, match="already has a reward 'length'"):
            play(env, ANSWER)


def test_default_rewards_can_be_overridden():
    class Brief(Books):
        def default_rewards(self):
            words = Reward(name="words", function=num_words, on="turn")
            return (*super().default_rewards()[:2], words)

    (first, second), outcome = play(Brief(), call("Ulm"), ANSWER)
    words = len(call("Ulm").split())
    assert first.reward_parts == {"tool_executed": 0.0, "answer_in_result": 0.0, "words": words}
    assert (second.reward, second.reward_parts) == (1.0, {"words": 1.0})
    assert (outcome.reward, outcome.reward_parts) == (0.0, {})


def test_rewards_on_answer_need_an_answer_in_the_last_turn():
    env = Books(Reward(name="length", function=num_turns, on="answer"))
    for texts in (["Ida, I think."], [call("Ulm")], [call("Ulm") + ANSWER]):
        _, outcome = play(env, *texts)
        assert (outcome.reward, outcome.reward_parts) == (0.0, {})
    _, outcome = play(env, call("Ulm"), ANSWER)
    assert outcome.reward_parts["length"] == 2.0


def test_functions_get_the_task_and_the_turns_with_calls_results_and_replies():
    arguments = []

    def record(task, turns):
        arguments.append((task, turns))
        return 0.0

    env = Books(Reward(name="record", function=record, on="turn"))
    play(env, call("Rom"), "<tool>rubbish</tool>", ANSWER)
    assert [len(turns) for _, turns in arguments] == [1, 2, 3]
    task, (first, second, third) = arguments[-1]
    assert task is TASK and third.text == ANSWER
    assert first.calls[0].call.arguments == {"query": "Rom"}
    assert first.calls[0].result.text == "Rom: by Ole."
    assert first.messages[0]["content"] == "<result>Rom: by Ole.</result>"
    assert not second.calls[0].result.success


def configs(*entries):
    return tuple(RewardConfig(**entry) for entry in entries)


def test_built_in_functions():
    form = {"on": "turn", "options": {"reasoning": False}}
    named = configs(
        {"function": "exact_match", "name": "em"},
        {"function": "f1"},
        {"function": "answer_contained", "name": "inside"},
        {"function": "tool_executed", "on": "call", "name": "executed"},
        {"function": "answer_in_result", "on": "call", "name": "found"},
        {"function": "retrieval", "on": "call"},
        {"function": "format", "name": "form", **form},
        {"function": "tags_once", "name": "tags", **form},
    )
    env = Books(*load_rewards(named))
    names = ("em", "f1", "inside")
    steps, outcome = play(env, call("Rom"), call("Ulm"), call("Ulm"), call("void"), ANSWER)
    parts = [dict(step.reward_parts) for step in steps]
    assert [p.get("executed") for p in parts] == [1.0, 1.0, 1.0, 0.0, None]
    assert [p.get("found") for p in parts] == [0.0, 1.0, 0.0, 0.0, None]
    assert [p.get("retrieval") for p in parts] == [0.5, 0.5, 0.0, 0.0, None]
    assert [(p["form"], p["tags"]) for p in parts] == [(1.0, 1.0)] * 5
    assert [outcome.reward_parts[name] for name in names] == [1.0, 1.0, 1.0]
    _, with_call = play(env, call("Ulm") + ANSWER)
    assert [with_call.reward_parts[name] for name in names] == [0.0, 0.0, 0.0]
    _, longer = play(env, "<answer>Ida Berg</answer>")
    assert [longer.reward_parts[name] for name in names] == [0.0, pytest.approx(2 / 3), 1.0]


def raises(task, turns):
    raise ZeroDivisionError("by zero")


def exits(task, turns):
    raise SystemExit(3)


def hangs(task, turns):
    threading.Event().wait(60)


async def hangs_async(task, turns):
    await asyncio.sleep(60)


@pytest.mark.parametrize(
    ("function", "inline", "kind", "text"),
    [
        (raises, False, "raised", "raised ZeroDivisionError: by zero"),
        (raises, True, "raised", "raised ZeroDivisionError: by zero"),
        (exits, False, "raised", "raised SystemExit: 3"),
        (hangs, False, "timeout", "returned nothing within 0.2 s"),
        (hangs_async, False, "timeout", "returned nothing within 0.2 s"),
        (lambda task, turns: None, False, "missing", "is None"),
        (lambda task, turns: "1.0", False, "not_a_number", "is '1.0'"),
        (lambda task, turns: math.nan, True, "not_finite", "is nan"),
        (lambda task, turns: -math.inf, False, "not_finite", "is -inf"),
    ],
)
@pytest.mark.parametrize("on", ["turn", "outcome"])
def test_a_failed_reward_is_a_typed_fault(function, inline, kind, text, on):
    bad = Reward(name="bad", function=function, on=on, deadline_s=0.2, inline=inline)
    env = Books(Reward(name="good", function=num_words, on=on), bad)
    begin = time.perf_counter()
    with pytest.raises(RewardFault) as caught:
        play(env, ANSWER)
    assert caught.value.kind == kind
    assert "reward 'bad'" in str(caught.value) and text in str(caught.value)
    assert time.perf_counter() - begin < 30


def test_numbers_of_other_types_are_converted():
    assert check_reward(True, "it") == 1.0
    assert check_reward(numpy.float32(0.5), "it") == 0.5
    assert type(check_reward(numpy.int64(2), "it")) is float


def test_the_functions_of_a_turn_run_at_the_same_time():
    barrier = threading.Barrier(8)

    def wait_for_all(task, turns):
        barrier.wait(timeout=5)  # raises unless all eight wait at the same time
        return 1.0

    env = Books(*[Reward(name=f"r{i}", function=wait_for_all, on="turn") for i in range(8)])
    (step,), _ = play(env, ANSWER)
    assert step.reward == 8.0


def roll(chat, env, *, max_error_share):
    sampler = ScriptedSampler(lambda prompt_ids: chat.encode_turn(ANSWER))
    limits = {"max_turns": 3, "group_size": 6, "max_error_share": max_error_share}
    (group,) = by_script.roll_out(env, chat, sampler, [TASK], **limits)
    return group


def test_a_failed_reward_is_counted_and_left_out_of_the_baseline(chat):
    values = iter([1.0, math.nan, 2.0, 6.0, None, 3.0])
    env = Books(Reward(name="some", function=lambda task, turns: next(values)))
    group = roll(chat, env, max_error_share=0.5)
    statuses = [t.status for t in group.trajectories]
    assert statuses.count("finished") == 4
    assert [statuses.count(f"reward_{kind}") for kind in ("missing", "not_finite")] == [1, 1]
    credit = assign_credit(group, rule="grpo_or")
    rows = list(zip(group.trajectories, credit.advantages, strict=True))
    failed = [(t.error, advantages) for t, advantages in rows if t.failed]
    assert all(e.startswith("reward 'some' is") and a == (0.0,) for e, a in failed)
    others = [advantages[0] for t, advantages in rows if not t.failed]
    assert sum(others) == pytest.approx(0.0, abs=1e-6) and max(others) > 1.0
    metrics = values_of(summarise([group]))
    assert metrics["status/reward_error"] == pytest.approx(2 / 6) == metrics["failed"]
    assert metrics["reward_part/some"] == pytest.approx(3.0)
    assert metrics["fault/reward_not_finite"] == metrics["fault/reward_missing"] == 1
    assert sum(value for name, value in metrics.items() if name.startswith("fault/")) == 2


class Broken(Books):
    def metrics(self, task, answer, turns):
        raise OSError("the disk is gone")


def no_score(task, turns):
    raise RewardFault("judge", "no score in 'Well, that depends.'")


@pytest.mark.parametrize(
    ("env", "status", "fault"),
    [
        (Books(Reward(name="a", function=raises)), "reward_raised", "reward_raised"),
        (Books(Reward(name="a", function=no_score)), "judge", "judge"),
        (Broken(), "error", "environment"),
    ],
)
def test_each_kind_of_fault_has_a_status_and_a_count(chat, env, status, fault):
    group = roll(chat, env, max_error_share=1.0)
    assert {t.status for t in group.trajectories} == {status}
    metrics = values_of(summarise([group]))
    assert {n: v for n, v in metrics.items() if n.startswith("fault/")} == {f"fault/{fault}": 6}


def test_too_many_failed_rewards_end_the_run(chat):
    env = Books(Reward(name="bad", function=raises))
    with pytest.raises(RolloutError, match=r"6 of 6 .*reward 'bad' raised ZeroDivisionError"):
        roll(chat, env, max_error_share=0.5)


MODULE = """
def brevity(task, turns, *, scale: float = 1.0):
    return scale / (1 + len(turns[-1].text))

class Counting:
    def __init__(self, *, start: int) -> None:
        self.start = start
    async def __call__(self, task, turns):
        return self.start + len(turns)

def three(task, turns, more):
    return 0.0

number = 3
"""

RECIPE = """
[env]
name = "lookup"
options = {people = 40, held_out_people = 40, popular_questions = 4, eval_tasks = 8}
[[env.rewards]]
function = "my_functions:brevity"
on = "turn"
weight = 0.5
options = { scale = 3.0 }
[[env.rewards]]
function = "my_functions:Counting"
name = "count"
options = { start = 10 }
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_functions.py").write_text(MODULE)
    (tmp_path / "r.toml").write_text(RECIPE)
    return tmp_path


def test_rewards_of_a_recipe(folder):
    config = load_config("r.toml")
    (folder / "again.toml").write_text(to_toml(config))
    assert load_config("again.toml") == config
    env = load_env(config.env.name, config.env.options, rewards=config.env.rewards)
    _, (step,), outcome = by_script.play(env, env.tasks("train")[0], "x" * 5)
    assert step.reward_parts == {"brevity": 0.5 * 3.0 / 6}
    assert outcome.reward_parts == {"count": 11.0}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"function": "f2"}], r"env.rewards\[0\].function: no reward function .* 'f2'.*'f1'"),
        ([{"function": "no_such_module:f"}], r"function: no module 'no_such_module'"),
        ([{"function": "my_functions:brevety"}], r"did you mean 'brevity'"),
        ([{"function": "my_functions:number"}], r"has no 'number'"),
        ([{"function": "my_functions:three"}], r"options.more: this option is required"),
        (
            [{"function": "my_functions:brevity", "options": {"scle": 1.0}}],
            r"env.rewards\[0\].options.scle: no such option; did you mean 'scale'",
        ),
        (
            [{"function": "my_functions:Counting", "options": {"start": "1"}}],
            r"options.start: Input should be a valid integer",
        ),
        ([{"function": "exact_match"}], r"lookup already has a reward 'exact_match'"),
        (
            [{"function": "f1"}, {"function": "f1", "on": "turn"}],
            r"env.rewards\[1\].name: there is already a reward 'f1'",
        ),
    ],
)
def test_bad_entries_are_named(folder, entries, message):
    options = load_config("r.toml").env.options
    with pytest.raises(ConfigError, match=message):
        load_env("lookup", options, rewards=configs(*entries))
