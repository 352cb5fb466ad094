"""The README's environment and rewards work as printed."""

from __future__ import annotations

import re
import textwrap
import tomllib
from pathlib import Path

import pytest
from by_script import play

from turnfast.config.recipe import build_config
from turnfast.config.schema import EnvConfig
from turnfast.envs import load_env
from turnfast.envs.load import BUILT_IN

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(heading: str) -> list[str]:
    """The indented blocks of one section."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    indented = re.findall(r"(?:^ {4}.*\n|^\n(?= {4}))+", section, flags=re.MULTILINE)
    return [textwrap.dedent(block).strip("\n") + "\n" for block in indented if block.strip()]


def test_the_environment_and_the_reward_of_the_readme_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, recipe, *_ = blocks("An environment is one file")
    assert code.startswith("# capitals.py") and "class Capitals(ToolEnv)" in code
    (tmp_path / "capitals.py").write_text(code)
    (tmp_path / "my_rewards.py").write_text(
        "def brevity(task, turns) -> float:\n    return 1.0 / len(turns[-1].text.split())\n"
    )
    rewards = build_config(tomllib.loads(recipe)).env.rewards
    env = load_env("capitals:Capitals", {}, rewards=rewards)
    questions = {split: {t.question for t in env.tasks(split)} for split in ("train", "eval")}
    assert questions["train"] and questions["eval"]
    assert not questions["train"] & questions["eval"]
    task = env.tasks("train")[0]
    country = task.question.removeprefix("What is the capital of ").rstrip("?")

    call = f'{{"name": "atlas", "args": {{"country": "{country}"}}}}'
    first, steps, outcome = play(
        env,
        task,
        f"<reasoning>Look.</reasoning><tool>{call}</tool>",
        f"<reasoning>So.</reasoning><answer>{task.answers[0]}</answer>",
    )
    assert "Look up the capital of a country." in first[0]["content"]
    assert steps[0].messages[0]["content"] == f"<result>{task.answers[0]}</result>"
    assert steps[0].reward_parts.keys() == {"tool_executed", "answer_in_result", "brevity"}
    assert steps[0].reward > 0.7 and 0 < steps[1].reward <= 0.1
    assert outcome.reward == pytest.approx(1.9) and outcome.metrics["exact_match"] == 1.0


def test_the_table_names_every_built_in_environment_and_no_other():
    section = README.split("| `env.name` |")[1].split("\n\n")[0]
    rows = [line.split("|")[1] for line in section.splitlines()[2:]]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(BUILT_IN)
    assert EnvConfig().name in BUILT_IN
