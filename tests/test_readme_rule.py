"""The README's worked rule is a rule: the file and the line that it shows run as they stand."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from by_hand import group_of, rollout, turn

from turnfast import credit
from turnfast.credit import assign_credit, check_rule, per_group
from turnfast.types import Group

README = Path(__file__).parent.parent / "README.md"


def blocks() -> list[str]:
    text = README.read_text(encoding="utf-8")
    return re.findall(r"```python\n(# turnfast/credit/.*?)```", text, re.DOTALL)


def group_with(*rewards: float) -> Group:
    return group_of(*(rollout(i, [turn(reward=r)] * 2) for i, r in enumerate(rewards)))


@pytest.fixture
def rank(tmp_path, monkeypatch) -> str:
    """The file imported, and its line put where the README says."""
    source, line = blocks()
    (tmp_path / "rank.py").write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("rank", tmp_path / "rank.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    registered = re.search(r'^    "(\w+)": per_group\((\w+\.\w+)\),$', line, re.MULTILINE)
    assert registered is not None and registered.groups() == ("rank", "rank.advantages")
    monkeypatch.setitem(credit.RULES, "rank", per_group(module.advantages))
    return source


def test_the_rule_of_the_readme_runs(rank):
    assert len(rank.splitlines()) <= 60
    options = {"std": "biased", "epsilon": 0.0}
    rows = assign_credit(group_with(0.0, 1.0, 1000.0), "rank", **options).advantages
    assert [row[0] for row in rows] == pytest.approx([-(1.5**0.5), 0.0, 1.5**0.5])
    tied = assign_credit(group_with(2.0, 2.0, 0.0), "rank", std="none").advantages
    assert [row[0] for row in tied] == pytest.approx([0.5, 0.5, -1.0])
    check_rule("rank", {"clip": 1.0, "whiten": True, "flatten": True, "baseline": "leave_one_out"})


def test_the_rules_of_the_readme_are_those_there_are():
    text = README.read_text(encoding="utf-8")
    table = text.split("## Which credit rule, when")[1].split("\n\n")[2]
    named = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert sorted(named) == sorted([*credit.RULES, *credit.VALUE_RULES])


def test_every_rule_is_one_short_file():
    folder = Path(credit.__file__).parent
    for name in (*credit.RULES, *credit.VALUE_RULES):
        assert len((folder / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 60
