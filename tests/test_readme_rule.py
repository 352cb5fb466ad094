"""The credit rule shown in the README is a working rule, and its table lists all rules."""

from __future__ import annotations

import importlib.util
import inspect
import re
from pathlib import Path

import pytest
from by_hand import group_of, rollout, turn

from turnfast.credit import RULES, BatchRule, assign_credit, check_rule
from turnfast.credit.with_values import ValueRule
from turnfast.types import Group

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def group_with(*rewards: float) -> Group:
    return group_of(*(rollout(i, [turn(reward=r)] * 2) for i, r in enumerate(rewards)))


@pytest.fixture
def rank(tmp_path, monkeypatch) -> str:
    """The README's rule, imported and registered as the README says; returns its source."""
    source, registration = re.findall(r"```python\n(# turnfast/credit/.*?)```", README, re.DOTALL)
    assert source.startswith("# turnfast/credit/rules/rank.py\n")
    assert registration.splitlines()[1].strip() == '"rank": rank.advantages,'
    (tmp_path / "rank.py").write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("rank", tmp_path / "rank.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(RULES, "rank", module.advantages)
    return source


def test_the_rule_in_the_readme_runs(rank):
    assert len(rank.splitlines()) <= 60
    options = {"std": "biased", "epsilon": 0.0}
    rows = assign_credit(group_with(0.0, 1.0, 1000.0), "rank", **options).advantages
    assert [row[0] for row in rows] == pytest.approx([-(1.5**0.5), 0.0, 1.5**0.5])
    tied = assign_credit(group_with(2.0, 2.0, 0.0), "rank", std="none").advantages
    assert [row[0] for row in tied] == pytest.approx([0.5, 0.5, -1.0])
    check_rule("rank", {"clip": 1.0, "whiten": True, "flatten": True, "baseline": "leave_one_out"})


def test_the_readme_lists_every_rule():
    table = README.split("## Which credit rule, when")[1].split("\n\n")[2]
    assert sorted(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == sorted(RULES)


def test_every_rule_is_one_short_file():
    functions = [
        rule.estimate
        if isinstance(rule, ValueRule)
        else rule.advantages
        if isinstance(rule, BatchRule)
        else rule
        for rule in RULES.values()
    ]
    files = {Path(inspect.getfile(function)) for function in functions}
    assert len(files) == len(RULES) and {file.parent.name for file in files} == {"rules"}
    assert all(len(file.read_text(encoding="utf-8").splitlines()) <= 60 for file in files)
