"""The tool loop: replies and rewards of each kind of turn; loading of environments."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import by_script
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnfast.envs import Outcome, Step, Task, ToolEnv, load_env, tool
from turnfast.errors import ConfigError

TASK = Task(id="q", question="Who wrote Ulm?", answers=("Ida Berg", "I. Berg"))
CORPUS = {"Ulm": "Ulm was written by Ida Berg.", "Rom": "Rom was painted by Ole.", "void": ""}


class Books(ToolEnv):
    """Questions on books."""

    def tasks(self, split):
        return [TASK]

    @tool
    def search(self, query: str) -> str:
        """Find one passage."""
        if query == "crash":
            raise OSError("the shelf fell over")
        return CORPUS[query]

    @tool
    async def count(self, query: str) -> str:
        """Count the letters of a passage."""
        return str(len(CORPUS[query]))


def play(env: ToolEnv, *texts: str) -> tuple[list[Step], Outcome]:
    return by_script.play(env, TASK, *texts)[1:]


def call(query: str, name: str = "search") -> str:
    body = f'{{"name": "{name}", "args": {{"query": "{query}"}}}}'
    return f"<reasoning>hm</reasoning><tool>{body}</tool>"


ANSWER = "<reasoning>so</reasoning><answer>Ida Berg</answer>"


def test_a_search_and_a_correct_answer_earn_0_7_and_1_9():
    (first, second), outcome = play(Books(), call("Ulm"), ANSWER)
    assert first.messages == (
        {"role": "user", "content": "<result>Ulm was written by Ida Berg.</result>"},
    )
    assert first.reward == pytest.approx(0.7)
    assert first.reward_parts == {"tool_executed": 0.2, "answer_in_result": 0.5}
    assert (first.tool_calls, first.tool_successes, first.done) == (1, 1, False)
    assert (second.reward, second.messages, second.done) == (None, (), True)
    assert outcome.reward == pytest.approx(1.9)
    assert outcome.reward_parts == {
        "answer_contained": 0.5,
        "exact_match": 1.0,
        "format": 0.2,
        "tags_once": 0.2,
    }
    assert outcome.metrics == {"exact_match": 1.0, "f1": 1.0, "answered": 1.0, "called": 1.0}


@pytest.mark.parametrize(
    ("text", "shown", "reward"),
    [
        (call("Rom"), "Rom was painted by Ole.", 0.2),
        (call("void"), "No result.", 0.0),
        (call("crash"), "Error: OSError: the shelf fell over", 0.0),
        (call("Ida Berg"), "Error: KeyError: 'Ida Berg'", 0.0),  # the answer, but in an error
        (call("Ulm", "find"), "Error: no such tool; known: search, count", 0.0),
        (call("Ulm")[:-8] + "</tool>", "Error: not valid JSON", 0.0),
        (call("Ulm").replace("query", "q"), "Error: query: missing; q: no such argument", 0.0),
        (call("Ulm", "count"), "28", 0.2),
    ],
)
def test_errors_and_empty_results_are_shown_and_not_rewarded(text, shown, reward):
    (step,), outcome = play(Books(), text)
    assert step.messages[0]["content"] == f"<result>{shown}</result>"
    assert step.reward == reward
    assert (step.tool_calls, step.tool_successes) == (1, int(reward > 0))
    assert not step.done
    assert (outcome.reward, outcome.metrics["answered"]) == (0.0, 0.0)


def test_calls_beyond_the_limit_are_one_error():
    env = Books(max_calls=3)
    (step,), _ = play(env, call("Ulm") + call("crash") + call("Rom") + call("Ulm") * 5)
    assert [line[:28] for line in step.messages[0]["content"].split("\n")] == [
        "<result>Ulm was written by I",
        "<result>Error: OSError: the ",
        "<result>Rom was painted by O",
        "<result>Error: too many call",
    ]
    assert (step.tool_calls, step.tool_successes) == (4, 2)
    assert step.reward == pytest.approx(0.2 * 2 / 4 + 0.5)


def test_a_repeated_search_is_not_paid_twice():
    steps, _ = play(Books(), call("Ulm"), call("Ulm"), ANSWER)
    assert [step.reward for step in steps] == [pytest.approx(0.7), pytest.approx(0.2), None]


def test_only_an_answer_in_a_turn_without_a_call_counts():
    (step,), outcome = play(Books(), call("Ulm") + ANSWER)
    assert (step.done, step.tool_calls, outcome.reward) == (False, 1, 0.0)
    (step,), outcome = play(Books(), ANSWER)
    assert (step.reward, step.done, outcome.reward) == (0.0, True, pytest.approx(1.9))
    assert outcome.metrics["called"] == 0.0


def test_a_turn_with_neither_call_nor_answer_ends_the_episode_or_gets_a_reminder():
    (step,), outcome = play(Books(), "Ida Berg, I believe.")
    assert (step.done, step.reward, outcome.reward) == (True, 0.0, 0.0)
    steps, outcome = play(Books(missing_answer="remind"), "Well.", "Hm.", ANSWER)
    assert [step.done for step in steps] == [False, False, True]
    assert [step.reward for step in steps] == [0.0, None, None]
    assert steps[0].messages == (
        {"role": "user", "content": "Write <tool>…</tool> or <answer>…</answer>."},
    )
    assert outcome.reward_parts["format"] == pytest.approx(0.2 / 3)


def test_a_longer_answer_is_contained_but_no_exact_match():
    _, outcome = play(Books(), "<answer>It was I. Berg.</answer>")
    parts = outcome.reward_parts
    assert (parts["answer_contained"], parts["exact_match"]) == (0.5, 0.0)
    assert outcome.metrics["f1"] == pytest.approx(2 * 2 / (4 + 2))


def test_weights_replace_the_defaults_by_name():
    env = Books(weights={"exact_match": 3.0, "tool_executed": 0.0})
    (first, _), outcome = play(env, call("Ulm"), ANSWER)
    assert first.reward_parts == {"tool_executed": 0.0, "answer_in_result": 0.5}
    assert outcome.reward == pytest.approx(3.9)
    with pytest.raises(ConfigError, match=r"env.options.weights.exakt: .*'exact_match'"):
        Books(weights={"exakt": 1.0})


def test_native_calls_get_tool_messages():
    env = Books(call_format="native")
    text = '<tool_call>{"name": "search", "arguments": {"query": "Ulm"}}</tool_call>'
    (step, _), outcome = play(env, text, "<answer>Ida Berg</answer>")
    assert env.native_calls
    assert step.messages == (
        {"role": "tool", "name": "search", "content": "Ulm was written by Ida Berg."},
    )
    assert outcome.reward == pytest.approx(1.9)
    assert "search" not in env.describe()  # the chat template lists the tools


def test_the_first_messages_describe_tools_and_format():
    (system, user) = asyncio.run(Books().episode(TASK).start())
    assert user == {"role": "user", "content": "Who wrote Ulm?"}
    for part in ('"name": "search"', "Count the letters", "<tool>", "<answer>", "<reasoning>"):
        assert part in system["content"]
    assert "<reasoning>" not in Books(reasoning=False).describe()
    assert len(Books(instructions="").first_messages(TASK)) == 1
    assert Books(instructions="Be brief.").first_messages(TASK)[0]["content"] == "Be brief."


@given(st.lists(st.text() | st.sampled_from([call("Ulm"), call("crash"), ANSWER]), max_size=4))
@settings(deadline=None)
def test_no_text_breaks_an_episode_and_rewards_stay_in_bounds(texts):
    steps, outcome = play(Books(missing_answer="remind"), *texts)
    assert all(step.reward is None or 0.0 <= step.reward <= 0.7 + 1e-9 for step in steps)
    assert all(step.tool_successes <= step.tool_calls for step in steps)
    assert 0.0 <= outcome.reward <= 1.9 + 1e-9


# --- loading

ENVIRONMENTS = """
from turnfast.envs import ToolEnv

class Bare:
    tools = ()
    native_calls = False
    def __init__(self, size: int, name: str = 'x', *, share: float = 0.5): pass
    def tasks(self, split): return []
    def episode(self, task): raise NotImplementedError

class Mine(ToolEnv):
    def __init__(self, depth: int = 1, **options):
        super().__init__(**options)
        if depth > 5:
            raise ValueError("depth 6 is too deep")

    def tasks(self, split):
        return []

class Open(Bare):
    def __init__(self, **options):
        self.options = options

class Closed(Open):
    def __init__(self, size: int):
        super().__init__(size=size)

class Taskless(ToolEnv):
    pass

class Forgetful(ToolEnv):
    def __init__(self):
        pass

    def tasks(self, split):
        return []

nothing = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "mine.py").write_text(ENVIRONMENTS)
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.mark.usefixtures("folder")
def test_options_are_passed_to_the_class_and_its_base():
    options = {"depth": 2, "reasoning": False, "weights": {"format": 0}}
    env = load_env("mine:Mine", options, max_turns=3, tool_timeout_s=0.5)
    assert isinstance(env, ToolEnv) and not env.reasoning
    assert (env.max_turns, env.tool_timeout_s) == (3, 0.5)
    bare = load_env("mine:Bare", {"size": 3})
    assert (bare.tasks("train"), bare.rewards) == ([], ())
    assert load_env("mine:Closed", {"size": 1}).options == {"size": 1}
    with pytest.raises(ValueError, match=r"^depth 6 is too deep$"):  # the class's own fault
        load_env("mine:Mine", {"depth": 6})


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mine:Mine", {"dept": 2}, "env.options.dept: .*did you mean 'depth'"),
        ("mine:Mine", {"reasonin": 2}, "did you mean 'reasoning'"),
        ("mine:Mine", {"call_format": "json"}, "env.options.call_format: .*'xml' or 'native'"),
        ("mine:Bare", {}, "env.options.size: this option is required"),
        ("mine:Bare", {"size": "3"}, "env.options.size: .*integer"),
        ("mine:Bare", {"size": 3, "sharee": 1.0}, "env.options.sharee: .*did you mean 'share'"),
        ("mine:Closed", {"size": 1, "name": "x"}, "env.options.name: no such option"),
        ("mine:Taskless", {}, r"mine:Taskless must define tasks\(self, split\)"),
        ("mine:Forgetful", {}, r"has no tools; does __init__ call super\(\).__init__"),
        ("mine:Min", {}, "has no 'Min'; did you mean 'Mine'"),
        ("mine:nothing", {}, "has no 'nothing'"),
        ("lokup", {}, "env.name: no environment is called 'lokup'; did you mean 'lookup'"),
        ("absent:Env", {}, "no module 'absent' in "),
        ("empty:Env", {}, "'empty' is not a Python module"),
        ("a b:Env", {}, "not of the form module:Class"),
        (":", {}, "not of the form module:Class"),
        ("os:path.join", {}, "not of the form module:Class"),
    ],
)
def test_errors_about_names_and_options_have_one_line(name, options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_env(name, options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("import nosuchpackage\n", ModuleNotFoundError, "No module named 'nosuchpackage'"),
        ("x = \n", SyntaxError, "invalid syntax"),
    ],
)
def test_errors_of_the_users_module_are_not_changed(folder, source, error, message):
    (folder / "broken.py").write_text(source)
    with pytest.raises(error, match=message):
        load_env("broken:Env", {})
