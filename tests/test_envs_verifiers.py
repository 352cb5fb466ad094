"""Environments of Prime Intellect's verifiers, tested with the real package.

Its dependencies conflict with those of vLLM, so these tests need their own virtual environment:
`make test-verifiers`.
"""

from __future__ import annotations

import json
import re
import signal
import sys

import pytest
from by_script import play, roll, roll_out

from turnfast.envs import RewardFault, load_env
from turnfast.errors import ConfigError
from turnfast.sampler.scripted import ScriptedSampler

try:
    from verifiers import MultiTurnEnv  # noqa: F401
except (ImportError, AttributeError):
    pytest.skip("needs verifiers<0.4: make test-verifiers", allow_module_level=True)

MODULE = '''
import asyncio
import verifiers as vf
from datasets import Dataset

ROWS = [{"question": f"Guess a number below {n}.", "answer": str(n // 2)} for n in range(4, 16)]

async def solved(completion, answer):
    return float(answer in completion[-1]["content"])

def boom(completion):
    raise KeyError("no such column")

def nan(completion):
    return float("nan")

class Guess(vf.MultiTurnEnv):
    """Guess a number; the reward of a turn is minus the distance, divided by 10."""

    def __init__(self, rewrite=False, fail=False, slow=0.0, **kwargs):
        self.rewrite, self.fail, self.slow = rewrite, fail, slow
        super().__init__(dataset=Dataset.from_list(ROWS), system_prompt="Say a number.", **kwargs)

    async def add_trajectory_step(self, state, step):
        said = step["completion"][-1].content
        if said.isdigit():
            step["reward"] = -abs(int(said) - int(state["answer"])) / 10
        await super().add_trajectory_step(state, step)

    async def get_prompt_messages(self, state):
        messages = await super().get_prompt_messages(state)
        return messages[1:] if self.rewrite and state["trajectory"] else messages

    async def env_response(self, messages, state, **kwargs):
        if self.fail:
            raise vf.InfraError("the machine has stopped")
        await asyncio.sleep(self.slow)
        said, answer = messages[-1]["content"], state["answer"]
        if not said.isdigit():
            return [{"role": "user", "content": "A number, please."}]
        if said == answer:
            state["final_env_response"] = [{"role": "user", "content": "Yes."}]
            return state["final_env_response"]
        word = "Higher." if int(said) < int(answer) else "Lower."
        return [{"role": "user", "content": word}]

class Silent(vf.Rubric):
    async def score_rollout(self, state):
        pass

async def square(number: int) -> str:
    """Square a number.

    Args:
        number: the number.
    """
    if number > 100:
        raise ValueError("too large")
    return str(number * number)

def group_score(completions) -> list[float]:
    return [0.0] * len(completions)

def load_environment(kind="guess", **kwargs):
    data = Dataset.from_list(ROWS)
    if kind == "single":
        rubric = vf.Rubric(funcs=[solved], weights=[2.0])
        return vf.SingleTurnEnv(dataset=data, eval_dataset=data.select(range(3)), rubric=rubric)
    if kind == "tools":
        rows = [{"question": f"What is {n} squared?", "answer": str(n * n)} for n in range(10)]
        return vf.ToolEnv(
            dataset=Dataset.from_list(rows), tools=[square], rubric=vf.Rubric(funcs=[solved])
        )
    if kind == "guess":
        return Guess(rubric=vf.Rubric(funcs=[solved]), **kwargs)
    if kind == "silent":
        env = vf.SingleTurnEnv(dataset=data)
        env.rubric = Silent()  # replaces the group of rubrics, which would compute a reward
        return env
    function = {"boom": boom, "nan": nan, "group": group_score}[kind]
    return vf.SingleTurnEnv(dataset=data, rubric=vf.Rubric(funcs=[solved, function]))
'''


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "guess_env_of_a_test.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("guess_env_of_a_test", None)


def make(kind: str, **args):
    options = {key: args.pop(key) for key in ("eval_tasks", "step_timeout_s") if key in args}
    return load_env(
        "verifiers",
        {"id": "guess-env-of-a-test", "args": {"kind": kind, **args}, "eval_tasks": 3, **options},
    )


def test_a_single_turn_is_scored_by_the_rubric():
    env = make("single")
    assert len(env.tasks("train")) == 12 and len(env.tasks("eval")) == 3
    task = env.tasks("train")[0]
    first, (step,), outcome = play(env, task, f"It is {task.answers[0]}.")
    assert first == ({"role": "user", "content": task.question},)
    assert step.done and step.reward is None and step.messages == ()
    assert outcome.reward == 2.0 and outcome.reward_parts == {"rubric": 2.0}
    assert outcome.metrics["solved"] == 1.0 and outcome.metrics["exact_match"] == 1.0
    assert outcome.metrics["num_turns"] == 1.0
    assert play(env, task, "I do not know.")[2].reward == 0.0


def test_replies_and_turn_rewards():
    env = make("guess")
    assert {t.id for t in env.tasks("eval")}.isdisjoint(t.id for t in env.tasks("train"))
    assert len(env.tasks("eval")) == 3 and len(env.tasks("train")) == 9
    task = next(task for task in env.tasks("train") if task.answers[0] != "2")
    answer = int(task.answers[0])
    first, steps, outcome = play(env, task, "eh", "2", str(answer))
    assert [message["role"] for message in first] == ["system", "user"]
    assert [s.messages[0]["content"] for s in steps[:2]] == ["A number, please.", "Higher."]
    assert [s.reward for s in steps] == [None, -(answer - 2) / 10, 0.0]
    assert [s.done for s in steps] == [False, False, True]
    assert outcome.reward == 0.0  # `solved` reads the last message, which is a reply
    assert outcome.metrics["num_turns"] == 3.0


def test_an_unfinished_rollout_is_scored():
    env = make("guess")
    task = env.tasks("train")[0]
    _, (step,), outcome = play(env, task, "12 or so")
    assert not step.done and outcome.metrics["num_turns"] == 1.0
    env = make("guess", max_turns=1)
    assert play(env, task, "12 or so")[1][0].done


def call(name: str, /, **args) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': args})}\n</tool_call>"


def test_tools_are_shown_called_and_counted():
    env = make("tools")
    assert env.native_calls and [tool.name for tool in env.tools] == ["square"]
    assert env.tools[0].schema["function"]["parameters"]["required"] == ["number"]
    _, steps, outcome = play(
        env,
        env.tasks("train")[0],
        "<think>7?</think>" + call("square", number=7) + call("square", number=101),
        call("cube", number=2) + "<tool_call>{</tool_call>",
        "It is 49.",
    )
    assert steps[0].messages == (
        {"role": "tool", "name": "square", "content": "49"},
        {"role": "tool", "name": "square", "content": "too large"},
    )
    assert [message["name"] for message in steps[1].messages] == ["cube", "unknown"]
    assert [(s.tool_calls, s.tool_successes) for s in steps] == [(2, 1), (2, 0), (0, 0)]
    assert steps[2].done and outcome.metrics["square_calls"] == 2.0


def test_concurrent_rollouts_of_groups(chat):
    def say(context: str) -> str:
        low, high = 0, int(re.findall(r"below (\d+)", context)[-1])
        replies = context.rpartition("below")[2]
        for number, reply in re.findall(r"\b(\d+)\b(?=\D*(Higher|Lower)\.)", replies):
            low, high = (int(number) + 1, high) if reply == "Higher" else (low, int(number))
        return str((low + high) // 2)

    env = make("guess")
    for _ in range(2):  # each time in a new event loop
        for group in roll(chat, env, say, max_turns=8, group_size=2, max_context=3000):
            one, two = group.trajectories
            assert (one.status, one.error) == ("finished", "")
            assert [turn.text for turn in one.turns] == [turn.text for turn in two.turns]
            assert one.turns[-1].reward == 0.0 and one.metrics["num_turns"] == len(one.turns)


def test_errors_of_the_environment():
    task = make("guess").tasks("train")[0]
    with pytest.raises(RewardFault, match=r"'boom' raised KeyError: 'no such column'") as fault:
        play(make("boom"), task, "1")
    assert fault.value.kind == "raised"
    with pytest.raises(RewardFault, match="the environment's outcome is None") as fault:
        play(make("silent"), task, "1")
    assert fault.value.kind == "missing"
    with pytest.raises(RuntimeError, match="the conversation may only grow"):
        play(make("guess", rewrite=True), task, "1")
    with pytest.raises(RuntimeError, match="InfraError: the machine has stopped"):
        play(make("guess", fail=True), task, "1")
    with pytest.raises(TimeoutError, match=r"verifiers, \S+: no step within 0.5 s"):
        play(make("guess", slow=60.0, step_timeout_s=0.5), task, "1")


def test_a_reward_of_nan_is_a_reward_error(chat):
    env = make("nan")
    sampler = ScriptedSampler(lambda ids: chat.encode_turn("4"))
    limits = {"max_turns": 2, "group_size": 2, "max_error_share": 1.0}
    (group,) = roll_out(env, chat, sampler, env.tasks("train")[:1], **limits)
    assert {t.status for t in group.trajectories} == {"reward_not_finite"}


def test_invalid_options_are_named_and_signal_handlers_are_kept():
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ConfigError, match=r"env.options.id: verifiers cannot import 'no-such-env'"):
        load_env("verifiers", {"id": "no-such-env"})
    with pytest.raises(ConfigError, match=r"'guess-env-of-a-test' scores the rollouts of a group"):
        make("group")
    with pytest.raises(ConfigError, match=r"env.options.eval_tasks: .* leaves none to train on"):
        make("guess", eval_tasks=12)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
