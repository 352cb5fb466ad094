"""Reward functions of the user: what they are handed, how they count, and how they fail."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from dataclasses import replace

import by_script
import pytest
from by_script import roll_out

from turnfast.config.recipe import load_config, to_toml
from turnfast.config.schema import RewardConfig
from turnfast.credit import assign_credit
from turnfast.envs import (
    Reward,
    RewardFault,
    Task,
    ToolEnv,
    check_reward,
    load_env,
    tool,
)
from turnfast.errors import ConfigError, RolloutError
from turnfast.metrics.reduce import values_of
from turnfast.metrics.rollouts import summarise
from turnfast.sampler.scripted import ScriptedSampler

TASK = Task(
    id="q", question="Who wrote Ulm?", answers=("Ida",), data={"supporting_titles": ("Ulm", "Rom")}
)


class Books(ToolEnv):
    def __init__(self) -> None:
        super().__init__(instructions="", weights={"tool_executed": 0.0, "answer_in_result": 0.0})

    def tasks(self, split):
        return [TASK]

    @tool
    def search(self, query: str) -> str:
        """Find one passage."""
        return {"Ulm": "Ulm: by Ida.", "Rom": "Rom: by Ole."}.get(query, "")


def call(query: str) -> str:
    return f'<tool>{{"name": "search", "args": {{"query": "{query}"}}}}</tool>'


ANSWER = "<answer>Ida</answer>"


def with_rewards(env, rewards):
    env.rewards = (*env.rewards, *rewards)
    return env


def play(env, *texts):
    return by_script.play(env, TASK, *texts)[1:]


def words(task, turns) -> float:
    return len(turns[-1].text.split())


async def turns_so_far(task, turns) -> float:
    await asyncio.sleep(0)
    return float(len(turns))


def test_weights_and_places_of_plain_and_async_functions():
    env = with_rewards(
        Books(),
        [
            Reward(name="words", function=words, on="turn", weight=-0.5),
            Reward(name="calls", function=turns_so_far, on="call", weight=0.25),
            Reward(name="length", function=turns_so_far, on="outcome", weight=2.0),
        ],
    )
    plain_steps, plain = play(Books(), call("Ulm"), ANSWER)
    (first, second), outcome = play(env, call("Ulm"), ANSWER)
    num_words = len(call("Ulm").split())
    assert first.reward_parts == {
        **plain_steps[0].reward_parts,
        "words": -0.5 * num_words,
        "calls": 0.25,
    }
    assert first.reward == pytest.approx(sum(first.reward_parts.values()))
    assert (second.reward, second.reward_parts) == (-0.5, {"words": -0.5})
    assert outcome.reward == pytest.approx(plain.reward + 4.0)
    assert outcome.reward_parts == {**plain.reward_parts, "length": 4.0}
    assert (first.messages, second.done) == (plain_steps[0].messages, True)


class Replying(Books):
    """Changes the environment's own step and outcome."""

    def __init__(self, **changes) -> None:
        super().__init__()
        self.changes = changes

    def episode(self, task):
        episode = super().episode(task)
        for method, change in self.changes.items():
            setattr(episode, method, self.changed(getattr(episode, method), change))
        return episode

    @staticmethod
    def changed(method, change):
        async def call(*args):
            return replace(await method(*args), **change)

        return call


@pytest.mark.parametrize("rewards", [0, 1])
@pytest.mark.parametrize(
    ("own", "kind"), [(None, "missing"), ("1.0", "not_a_number"), (math.nan, "not_finite")]
)
@pytest.mark.parametrize("method", ["step", "finish"])
def test_the_rewards_of_the_environment_are_checked_too(own, kind, method, rewards):
    length = Reward(name="length", function=turns_so_far, on="turn", weight=2.0)
    env = with_rewards(Replying(**{method: {"reward": own}}), [length] * rewards)
    if method == "step" and own is None:  # a turn may have no reward
        (step,), _ = play(env, ANSWER)
        assert step.reward == (2.0 if rewards else None)
        return
    with pytest.raises(RewardFault, match="the environment's") as fault:
        play(env, ANSWER)
    assert fault.value.kind == kind


@pytest.mark.parametrize("method", ["step", "finish"])
def test_a_part_of_the_environment_and_a_reward_need_different_names(method):
    on = {"step": "turn", "finish": "outcome"}[method]
    env = Replying(**{method: {"reward_parts": {"length": 1.0}}})
    with_rewards(env, [Reward(name="length", function=turns_so_far, on=on)])
    with pytest.raises(ConfigError, match="already has a reward 'length'"):
        play(env, ANSWER)


def test_a_tool_env_states_its_rewards_in_one_method():
    class Brief(Books):
        def default_rewards(self):
            short = Reward(name="short", function=self.is_short, on="turn")
            return (*super().default_rewards()[:2], short)

        def is_short(self, task, turns):
            return float(len(turns[-1].text) < 40)

    (first, second), outcome = play(Brief(), call("Ulm"), ANSWER)
    assert first.reward_parts == {"tool_executed": 0.0, "answer_in_result": 0.0, "short": 0.0}
    assert second.reward_parts == {"short": 1.0} and second.reward == 1.0
    assert (outcome.reward, outcome.reward_parts) == (0.0, {})


def test_rewards_on_answer_need_an_answer_in_the_last_turn():
    env = with_rewards(Books(), [Reward(name="n", function=turns_so_far, on="answer")])
    for texts in (["Ida, I think."], [call("Ulm")], [call("Ulm") + ANSWER]):
        _, outcome = play(env, *texts)
        assert (outcome.reward, outcome.reward_parts) == (0.0, {})
    _, outcome = play(env, call("Ulm"), ANSWER)
    assert outcome.reward_parts["n"] == 2.0


def test_functions_see_calls_results_and_replies():
    seen = []

    def look(task, turns):
        seen.append((task, turns))
        return 0.0

    env = with_rewards(Books(), [Reward(name="look", function=look, on="turn")])
    play(env, call("Rom"), "<tool>rubbish</tool>", ANSWER)
    task, turns = seen[-1]
    assert task is TASK and [turn.text for turn in turns][2] == ANSWER
    assert turns[0].calls[0].call.arguments == {"query": "Rom"}
    assert turns[0].calls[0].result.text == "Rom: by Ole."
    assert not turns[1].calls[0].result.success
    assert turns[0].messages[0]["content"] == "<result>Rom: by Ole.</result>"


def configs(*entries):
    return tuple(RewardConfig(**entry) for entry in entries)


def test_built_in_functions_count_as_those_of_the_environment(tmp_path):
    named = configs(
        {"function": "exact_match", "name": "em"},
        {"function": "f1"},
        {"function": "answer_contained", "name": "inside"},
        {"function": "tool_executed", "on": "call", "name": "executed"},
        {"function": "answer_in_result", "on": "call", "name": "found"},
        {"function": "retrieval", "on": "call"},
        {"function": "format", "on": "turn", "name": "form", "options": {"reasoning": False}},
        {"function": "tags_once", "on": "turn", "name": "tags", "options": {"reasoning": False}},
    )
    from turnfast.envs.rewards.builtin import load_rewards

    env = with_rewards(Books(), load_rewards(named))
    steps, outcome = play(env, call("Rom"), call("Ulm"), call("Ulm"), call("void"), ANSWER)
    parts = [dict(step.reward_parts) for step in steps]
    assert [p.get("executed") for p in parts] == [1.0, 1.0, 1.0, 0.0, None]
    assert [p.get("found") for p in parts] == [0.0, 1.0, 0.0, 0.0, None]
    assert [p.get("retrieval") for p in parts] == [0.5, 0.5, 0.0, 0.0, None]
    assert [(p["form"], p["tags"]) for p in parts] == [(1.0, 1.0)] * 5
    assert [outcome.reward_parts[name] for name in ("em", "f1", "inside")] == [1.0, 1.0, 1.0]
    _, beside = play(env, call("Ulm") + ANSWER)
    assert [beside.reward_parts[name] for name in ("em", "f1", "inside")] == [0.0, 0.0, 0.0]
    _, wrong = play(env, "<answer>Ida Berg</answer>")
    assert (wrong.reward_parts["em"], wrong.reward_parts["f1"]) == (0.0, pytest.approx(2 / 3))


def raises(task, turns):
    raise ZeroDivisionError("by nought")


def exits(task, turns):
    raise SystemExit(3)


def hangs(task, turns):
    threading.Event().wait(60)


async def hangs_async(task, turns):
    await asyncio.sleep(60)


FAULTS = [
    (raises, "raised", "raised ZeroDivisionError: by nought"),
    (exits, "raised", "raised SystemExit: 3"),
    (hangs, "timeout", "returned nothing within 0.2 s"),
    (hangs_async, "timeout", "returned nothing within 0.2 s"),
    (lambda task, turns: None, "missing", "is None"),
    (lambda task, turns: "1.0", "not_a_number", "is '1.0'"),
    (lambda task, turns: math.nan, "not_finite", "is nan"),
    (lambda task, turns: -math.inf, "not_finite", "is -inf"),
]


@pytest.mark.parametrize(("function", "kind", "text"), FAULTS)
@pytest.mark.parametrize("on", ["turn", "outcome"])
def test_what_is_no_reward_is_a_typed_fault(function, kind, text, on):
    bad = Reward(name="bad", function=function, on=on, deadline_s=0.2)
    env = with_rewards(Books(), [Reward(name="good", function=words, on=on), bad])
    begin = time.perf_counter()
    with pytest.raises(RewardFault) as caught:
        play(env, ANSWER)
    assert caught.value.kind == kind
    assert "reward 'bad'" in str(caught.value) and text in str(caught.value)
    assert time.perf_counter() - begin < 30


def test_numbers_of_other_kinds_are_taken():
    import numpy

    assert check_reward(True, "it") == 1.0
    assert check_reward(numpy.float32(0.5), "it") == 0.5
    assert type(check_reward(numpy.int64(2), "it")) is float


def test_functions_of_a_turn_run_at_the_same_time():
    everybody = threading.Barrier(8)

    def meet(task, turns):
        everybody.wait(timeout=5)  # raises unless all eight are here
        return 1.0

    env = with_rewards(
        Books(), [Reward(name=f"meet{i}", function=meet, on="turn") for i in range(8)]
    )
    (step,), _ = play(env, ANSWER)
    assert step.reward == 8.0


def roll(chat, env, *, share):
    sampler = ScriptedSampler(lambda prompt_ids: chat.encode_turn(ANSWER))
    limits = {"max_turns": 3, "group_size": 6, "max_error_share": share}
    return roll_out(env, chat, sampler, [TASK], **limits)


def test_a_failed_reward_is_counted_and_stays_out_of_the_baseline(chat):
    calls = []

    def moody(task, turns):
        calls.append(len(calls))
        return [1.0, math.nan, 2.0, 6.0, None, 3.0][calls[-1]]

    env = with_rewards(Books(), [Reward(name="moody", function=moody, weight=1.0)])
    (group,) = roll(chat, env, share=0.5)
    statuses = [t.status for t in group.trajectories]
    assert statuses.count("finished") == 4
    assert [statuses.count(f"reward_{kind}") for kind in ("missing", "not_finite")] == [1, 1]
    failed = [t for t in group.trajectories if t.failed]
    assert all(t.error.startswith("reward 'moody' is") for t in failed)
    credit = assign_credit(group, rule="grpo_or")
    for t, advantages in zip(group.trajectories, credit.advantages, strict=True):
        assert not t.failed or advantages == (0.0,)
    healthy = [
        a[0] for t, a in zip(group.trajectories, credit.advantages, strict=True) if not t.failed
    ]
    assert sum(healthy) == pytest.approx(0.0, abs=1e-6) and max(healthy) > 1.0
    figures = values_of(summarise([group]))
    assert figures["status/reward_error"] == pytest.approx(2 / 6) == figures["failed"]
    assert figures["reward_part/moody"] == pytest.approx(3.0)
    assert figures["fault/reward_not_finite"] == figures["fault/reward_missing"] == 1
    assert sum(value for name, value in figures.items() if name.startswith("fault/")) == 2


def test_every_kind_of_fault_is_counted_by_itself(chat):
    """What a reward function can do wrong, a judge that talks, and an environment that breaks."""

    def judged(task, turns):
        raise RewardFault("judge", "no score in 'Well, that depends.'")

    async def hangs(task, turns):
        await asyncio.sleep(60)

    kinds = {
        "reward_raised": with_rewards(Books(), [Reward(name="a", function=raises)]),
        "reward_timeout": with_rewards(Books(), [Reward(name="a", function=hangs, deadline_s=0.2)]),
        "reward_not_a_number": with_rewards(
            Books(), [Reward(name="a", function=lambda task, turns: "0.5")]
        ),
        "judge": with_rewards(Books(), [Reward(name="a", function=judged)]),
        "environment": Torn(),
    }
    for kind, env in kinds.items():
        (group,) = roll(chat, env, share=1.0)
        status = "error" if kind == "environment" else kind
        assert {t.status for t in group.trajectories} == {status}
        faults = {n: v for n, v in values_of(summarise([group])).items() if n.startswith("fault/")}
        assert faults == {f"fault/{kind}": 6}


class Torn(Books):
    def metrics(self, task, answer, turns):
        raise OSError("the disk is gone")


def test_too_many_failed_rewards_end_the_run_in_words(chat):
    env = with_rewards(Books(), [Reward(name="bad", function=raises)])
    with pytest.raises(RolloutError, match=r"6 of 6 .*reward 'bad' raised ZeroDivisionError"):
        roll(chat, env, share=0.5)


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
function = "my_rewards_of_a_test:brevity"
on = "turn"
weight = 0.5
options = { scale = 3.0 }
[[env.rewards]]
function = "my_rewards_of_a_test:Counting"
name = "count"
options = { start = 10 }
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards_of_a_test.py").write_text(MODULE)
    return tmp_path


def test_from_a_recipe_and_back(folder):
    (folder / "r.toml").write_text(RECIPE)
    config = load_config("r.toml")
    (folder / "again.toml").write_text(to_toml(config))
    assert load_config("again.toml") == config
    env = load_env(config.env.name, config.env.options, rewards=config.env.rewards)
    (step,), outcome = play_lookup(env, "x" * 5)
    assert step.reward_parts == {"brevity": 0.5 * 3.0 / 6}
    assert outcome.reward_parts == {"count": 11.0}


def play_lookup(env, *texts):
    return by_script.play(env, env.tasks("train")[0], *texts)[1:]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"function": "f2"}, r"env.rewards\[0\].function: no reward function is called 'f2'.*'f1'"),
        ({"function": "no_such_room:f"}, r"function: no module 'no_such_room'"),
        ({"function": "my_rewards_of_a_test:brevety"}, r"did you mean 'brevity'"),
        ({"function": "my_rewards_of_a_test:number"}, r"has no 'number'"),
        ({"function": "my_rewards_of_a_test:three"}, r"options.more: this option is required"),
        (
            {"function": "my_rewards_of_a_test:brevity", "options": {"scle": 1.0}},
            r"env.rewards\[0\].options.scle: no such option; did you mean 'scale'",
        ),
        (
            {"function": "my_rewards_of_a_test:Counting", "options": {"start": "1"}},
            r"options.start: Input should be a valid integer",
        ),
        ({"function": "exact_match"}, r"lookup already has a reward 'exact_match'"),
    ],
)
def test_a_bad_entry_is_refused_by_name(folder, entry, message):
    options = {"people": 40, "held_out_people": 40, "popular_questions": 4, "eval_tasks": 8}
    with pytest.raises(ConfigError, match=message):
        load_env("lookup", options, rewards=configs(entry))


def test_two_of_one_name_are_refused():
    twice = configs({"function": "f1"}, {"function": "f1", "on": "turn"})
    with pytest.raises(ConfigError, match=r"env.rewards\[1\].name: there is already a reward 'f1'"):
        load_env("lookup", {}, rewards=twice)
    twice = with_rewards(Books(), [Reward(name="f", function=words)] * 2)
    with pytest.raises(ConfigError, match="already has a reward 'f'"):
        play(twice, ANSWER)
