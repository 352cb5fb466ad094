"""Environments and tools of other packages, tested with the real packages."""

from __future__ import annotations

import json
import random
import re
import sys
import time
from itertools import permutations

import pytest
from by_script import play, roll

from turnfast.envs import ToolEnv, load_env
from turnfast.envs.adapters.mcp import McpServer
from turnfast.envs.rewards.judge import Judge
from turnfast.errors import ConfigError

SIZES = {"group_size": 2, "num_tasks": 3, "max_context": 6000}


@pytest.mark.parametrize(
    ("package", "install", "make"),
    [
        ("gymnasium", "turnfast[adapters]", lambda: load_env("gymnasium", {"id": "FrozenLake-v1"})),
        ("textarena", "turnfast[adapters]", lambda: load_env("textarena", {"id": "Mastermind-v0"})),
        ("mcp", "turnfast[adapters]", lambda: McpServer("python", ["server.py"])),
        ("verifiers", "verifiers<0.4", lambda: load_env("verifiers", {"id": "wordle"})),
        ("datasets", "turnfast[data]", lambda: load_env("search", {"dataset": "trivia_qa"})),
        ("openai", "turnfast[judge]", lambda: Judge(base_url="http://h/v1", model="m")),
    ],
)
def test_a_missing_package_is_named(monkeypatch, package, install, make):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=f"needs the package {package} .*{re.escape(install)}"):
        make()


def make(package: str, **options):
    pytest.importorskip(package)
    return load_env(package, options)


@pytest.mark.parametrize(
    ("package", "options", "message"),
    [
        ("gymnasium", {"id": "NoSuch-v0"}, "id: gymnasium cannot find 'NoSuch-v0': NameNotFound"),
        ("gymnasium", {"id": "no_such_module:X-v0"}, "id: .*: ModuleNotFoundError: .*no_such_mod"),
        ("gymnasium", {"id": "Pendulum-v1"}, "id: the action space of 'Pendulum-v1' is Box"),
        ("gymnasium", {"id": "FrozenLake-v1", "actions": ["a"]}, "actions: 1 names for the 4"),
        ("textarena", {"id": "NoSuch-v0"}, "id: textarena has no game 'NoSuch-v0'"),
        ("textarena", {"id": "TicTacToe-v0"}, "id: .* cannot be played by one player: .* to be 2"),
    ],
)
def test_invalid_options_are_named(package, options, message):
    with pytest.raises(ConfigError, match=rf"env.options.{message}"):
        make(package, **options)


# --- gymnasium

LAKE = {
    "id": "FrozenLake-v1",
    "kwargs": {"is_slippery": False},
    "actions": ["left", "down", "right", "up"],
}


def act(action: str) -> str:
    return f"<action>{action}</action>"


def test_gymnasium_text_rendering_rewards_and_end():
    env = make("gymnasium", **LAKE)
    path = ["down", "Down", "right", "right", "down", "right"]
    first, steps, outcome = play(env, env.tasks("train")[0], *map(act, path))
    assert "the actions are left, down, right, up." in first[0]["content"]
    assert "[S]FFF\nFHFH\nFFFH\nHFFG" in first[0]["content"]
    assert steps[0].messages[0]["content"].endswith("SFFF\n[F]HFH\nFFFH\nHFFG")
    assert [step.reward for step in steps] == [0.0] * 5 + [1.0]
    assert [step.done for step in steps] == [False] * 5 + [True]
    assert outcome.reward == 0.0
    assert outcome.metrics == {"return": 1.0, "terminated": 1.0}


def test_gymnasium_malformed_turns_and_rewards_on_the_outcome():
    env = make("gymnasium", **LAKE, malformed=-0.25, rewards_on="outcome")
    task = env.tasks("train")[0]
    _, steps, outcome = play(env, task, "right", act("north"), act("right"), act("down"))
    assert [step.reward for step in steps] == [-0.25, -0.25, None, None]
    assert [step.tool_successes for step in steps] == [0, 0, 1, 1]
    assert steps[-1].done and outcome.reward == 0.0  # it fell into a hole
    path = ["down", "down", "right", "right", "down", "right"]
    assert play(env, task, *map(act, path))[2].reward == 1.0


def test_gymnasium_numbered_actions_seeds_and_observations():
    env = make("gymnasium", id="CartPole-v1", train_tasks=4, eval_tasks=2)
    first = [play(env, task)[0] for task in (*env.tasks("train"), *env.tasks("eval"))]
    assert len({str(messages) for messages in first}) == 6
    assert first[0] == play(env, env.tasks("train")[0])[0]
    _, steps, _ = play(env, env.tasks("train")[0], act("0"), act("2"), act("1"))
    assert [step.tool_successes for step in steps] == [1, 0, 1] and steps[0].reward == 1.0


TEXT_ENV = '''
import gymnasium
from gymnasium.spaces import Text

class Echo(gymnasium.Env):
    """Ends when the action is the requested letter."""
    observation_space = Text(max_length=50)
    action_space = Text(max_length=10)
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.word = "abc"[int(self.np_random.integers(3))]
        return f"Say {self.word}.", {}
    def step(self, action):
        return f"You said {action}.", float(action == self.word), action == self.word, False, {}

class Hang(Echo):
    def step(self, action):
        import time
        time.sleep(60)

gymnasium.register("Echo-v0", entry_point=Echo)
gymnasium.register("Hang-v0", entry_point=Hang)
'''


@pytest.fixture
def text_env(tmp_path, monkeypatch):
    (tmp_path / "text_env_of_a_test.py").write_text(TEXT_ENV)
    monkeypatch.syspath_prepend(tmp_path)


def test_gymnasium_text_actions_and_observations(chat, text_env):
    env = make("gymnasium", id="text_env_of_a_test:Echo-v0")

    def say(context: str) -> str:
        letter = re.findall(r"Say (\w)\.", context)[-1]
        return act(letter if "You said" in context else "hello")

    for group in roll(chat, env, say, max_turns=5, **SIZES):
        for t in group.trajectories:
            assert [turn.reward for turn in t.turns] == [0.0, 1.0] and t.status == "finished"
            assert t.turns[0].reply == "You said hello."
    _, (step,), _ = play(env, env.tasks("train")[0], act("far too long a word"))
    assert step.tool_successes == 0


def test_gymnasium_a_hanging_step_times_out(text_env):
    env = make("gymnasium", id="text_env_of_a_test:Hang-v0", step_timeout_s=0.5)
    with pytest.raises(TimeoutError, match="no step within"):
        play(env, env.tasks("train")[0], act("a"))


def test_gymnasium_errors_of_the_environment_are_raised_unchanged():
    with pytest.raises(TypeError, match="'x'"):
        make("gymnasium", id="FrozenLake-v1", kwargs={"x": 1})


# --- textarena


def test_textarena_complete_games(chat):
    env = make("textarena", id="Mastermind-v0")

    def crack(context: str) -> str:
        """The first code that is consistent with all replies so far."""
        pattern = r"\[(\d) (\d) (\d) (\d)\][^\[]*?(\d) black peg.*?(\d) white peg"
        replies = re.findall(pattern, context)
        for code in permutations("123456", 4):
            if all(pegs(code, r[:4]) == (int(r[4]), int(r[5])) for r in replies):
                return f"<think>[1]</think>[{' '.join(code)}]"
        raise AssertionError("no code is consistent")

    state = random.getstate()
    groups = roll(chat, env, crack, max_turns=20, **SIZES)
    assert random.getstate() == state  # the games do not change the global generator
    for group in groups:
        one, two = group.trajectories
        assert one.status == "finished" and one.outcome == 1.0
        assert one.metrics["invalid_move"] == 0.0 and one.metrics["moves"] == len(one.turns)
        assert [t.text for t in one.turns] == [t.text for t in two.turns]
        assert all("You are playing" not in turn.reply for turn in one.turns)
    assert len({group.trajectories[0].turns[-1].text for group in groups}) > 1


def pegs(code, guess) -> tuple[int, int]:
    """The numbers of black and white pegs for a guess."""
    black = sum(a == b for a, b in zip(code, guess, strict=True))
    return black, len(set(code) & set(guess)) - black


def test_textarena_an_unfinished_game_and_an_invalid_move():
    env = make("textarena", id="Mastermind-v0")
    first, steps, outcome = play(env, env.tasks("eval")[0], "[1 2 3 4]")
    assert "You are playing Mastermind" in first[0]["content"]
    assert steps[0].messages[0]["role"] == "user" and "peg" in steps[0].messages[0]["content"]
    assert steps[0].done or outcome.reward == 0.0
    _, steps, outcome = play(env, env.tasks("eval")[0], "hello", "hello")
    assert steps[-1].done and outcome.metrics["invalid_move"] == 1.0


def test_textarena_a_hanging_game_times_out_and_the_next_one_works(monkeypatch):
    env = make("textarena", id="Mastermind-v0", step_timeout_s=0.5)
    make_game = env.make

    def make_slow_game():
        game = make_game()
        game.step = lambda action: time.sleep(2.0)
        return game

    monkeypatch.setattr(env, "make", make_slow_game)
    with pytest.raises(TimeoutError, match=r"textarena, train-0: no step within 0.5 s"):
        play(env, env.tasks("train")[0], "[1 2 3 4]")
    time.sleep(2.0)
    monkeypatch.undo()
    assert play(env, env.tasks("train")[0], "[1 2 3 4]")[1][0].messages


# --- MCP

SERVER = '''
import os, sys
try:
    from mcp.server.mcpserver import MCPServer as Server
except ImportError:
    from mcp.server.fastmcp import FastMCP as Server

server = Server("notes")

@server.tool()
def look_up(title: str, lines: int = 1) -> str:
    """Find a note
    by its title."""
    if title == "crash":
        raise ValueError("no such note")
    if title == "exit":
        os._exit(3)
    return "\\n".join([f"{title} was written by Ida."] * lines)

@server.tool()
async def wait(seconds: float) -> str:
    """Wait."""
    import asyncio
    await asyncio.sleep(seconds)
    return os.environ.get("NOTES_KEY", "none")

server.run(transport="stdio")
'''


@pytest.fixture
def questions(tmp_path) -> str:
    rows = [{"id": str(i), "question": f"Who wrote Ulm{i}?", "answers": ["Ida"]} for i in range(6)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path / "q.jsonl")


@pytest.fixture
def notes(tmp_path, questions):
    pytest.importorskip("mcp")
    (tmp_path / "server.py").write_text(SERVER)
    options = {
        "command": sys.executable,
        "args": [str(tmp_path / "server.py")],
        "questions": questions,
        "env": {"NOTES_KEY": "secret"},
        "start_timeout_s": 120.0,
    }
    env = load_env("mcp", options, tool_timeout_s=120.0)
    yield env
    env.server.close()


def call(name: str, /, **args) -> str:
    return f"<tool>{json.dumps({'name': name, 'args': args})}</tool>"


def result(env, *texts: str):
    """The last step of an episode with these turns."""
    return play(env, env.tasks("train")[0], *texts)[1][-1]


def test_mcp_schemas_results_and_errors(notes):
    assert [tool.name for tool in notes.tools] == ["look_up", "wait"]
    assert notes.tools[0].description == "Find a note by its title."
    assert notes.tools[0].parameters["required"] == ["title"]
    assert '"look_up"' in notes.describe()
    calls = ({"title": "Ulm"}, {"title": "crash"}, {"title": 3}, {"name": "Ulm"})
    step = result(notes, "".join(call("look_up", **args) for args in calls))
    shown = step.messages[0]["content"].split("\n")
    assert shown[0] == "<result>Ulm was written by Ida.</result>"
    assert "<result>Error: " in shown[1] and "look_up" in shown[1]
    assert "Error: title: Input should be a valid string" in shown[2]
    assert "title: missing" in shown[3] and "name: no such argument" in shown[3]
    assert (step.tool_calls, step.tool_successes) == (4, 1)
    step = result(notes, call("wait", seconds=0.0))
    assert step.messages[0]["content"] == "<result>secret</result>"


def test_mcp_calls_time_out_and_a_stopped_server_is_an_error(notes):
    notes.set_limits(max_turns=4, tool_timeout_s=0.3)
    step = result(notes, call("wait", seconds=60.0))
    assert "gave no result in 0.3 s" in step.messages[0]["content"]
    notes.set_limits(max_turns=4, tool_timeout_s=120.0)
    step = result(notes, call("look_up", title="Rom", lines=2))
    assert step.messages[0]["content"].count("Rom was written") == 2
    for text in (call("look_up", title="exit"), call("wait", seconds=0.0)):
        assert "Error: " in result(notes, text).messages[0]["content"]


def test_mcp_tools_in_complete_rollouts(chat, notes):
    def say(context: str) -> str:
        if "was written by" in context:
            return "<answer>Ida</answer>"
        return call("look_up", title=re.findall(r"Who wrote (\w+)\?", context)[-1])

    for group in roll(chat, notes, say, max_turns=4, **{**SIZES, "num_tasks": 4}):
        for t in group.trajectories:
            assert (t.status, t.metrics["exact_match"], len(t.turns)) == ("finished", 1.0, 2)
            assert t.turns[0].tool_successes == 1


@pytest.mark.parametrize(
    ("command", "args", "start_timeout_s", "message"),
    [
        ("no-such-program-here", [], 120.0, "'no-such-program-here': FileNotFoundError"),
        (sys.executable, ["-c", "pass"], 120.0, "-c pass': M[Cc][Pp]Error: "),
        (
            sys.executable,
            ["-c", "import time; time.sleep(60)"],
            1.0,
            "did not list its tools within 1 s",
        ),
    ],
)
def test_mcp_a_command_that_is_not_a_server(questions, command, args, start_timeout_s, message):
    options = {"command": command, "args": args, "start_timeout_s": start_timeout_s}
    with pytest.raises(ConfigError, match=message):
        make("mcp", questions=questions, **options)


def test_mcp_tools_in_another_environment(notes):
    class WithNotes(ToolEnv):
        def tasks(self, split):
            return notes.tasks(split)

    env = WithNotes()
    env.tools = notes.tools
    assert result(env, call("look_up", title="Ulm")).tool_successes == 1
