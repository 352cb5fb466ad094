"""The run directory: strict JSON after every kind of damage, resume, and metric sinks."""

from __future__ import annotations

import json
import math
import sys
import tomllib
from types import SimpleNamespace

import by_hand
import numpy as np
import pytest
from by_hand import rollout
from hypothesis import given
from hypothesis import strategies as st

from turnfast.config.recipe import build_config
from turnfast.config.schema import Config
from turnfast.errors import ConfigError
from turnfast.rundir.directory import RunDir, read_metrics
from turnfast.rundir.jsonl import append_lines, read_lines, to_strict
from turnfast.types import Credit, Group, Task, Turn


def turn(text="", reward=None, **fields) -> Turn:
    return by_hand.turn(3, reward, text=text, **fields)


def group(*trajectories) -> Group:
    return Group(task=Task(id="q", question="Who?", answers=("Ida",)), trajectories=trajectories)


def steps_of(run: RunDir) -> list[int]:
    return [line["step"] for line in read_metrics(run.path)]


def test_config_toml_holds_the_whole_recipe(tmp_path):
    config = build_config({"credit": {"rule": "grpo_mr"}, "train": {"seed": 4}})
    run = RunDir.create(tmp_path / "runs" / "a", config)
    tree = tomllib.loads((run.path / "config.toml").read_text())
    assert build_config(tree) == config


@pytest.mark.parametrize("name", ["config.toml", "metrics.jsonl", "rollouts.jsonl", "checkpoints"])
def test_a_used_run_directory_is_rejected(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=r"already contains a run.*--resume.*--run-dir"):
        RunDir.create(tmp_path, Config())
    RunDir.create(tmp_path, Config(), resume=True)


def test_a_run_that_failed_before_its_first_line_leaves_the_directory_usable(tmp_path):
    with pytest.raises(KeyError), RunDir.create(tmp_path / "a", Config()):
        raise KeyError("no such model")
    with pytest.raises(KeyError), RunDir.create(tmp_path / "a", Config()) as run:
        run.log(0, {})
        raise KeyError
    with pytest.raises(ConfigError, match="already contains a run"):
        RunDir.create(tmp_path / "a", Config())


def test_resuming_with_another_recipe_keeps_both(tmp_path):
    RunDir.create(tmp_path, build_config({"train": {"steps": 5}}))
    RunDir.create(tmp_path, build_config({"train": {"steps": 9}}), resume=True)
    RunDir.create(tmp_path, build_config({"train": {"steps": 9}}), resume=True)
    steps = {
        path.name: tomllib.loads(path.read_text())["train"]["steps"]
        for path in tmp_path.glob("config*.toml")
    }
    assert steps == {"config.toml": 9, "config.1.toml": 5}


def test_a_path_that_cannot_be_a_run_directory(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(ConfigError, match=r"is a file.*--run-dir"):
        RunDir.create(tmp_path / "a", Config())
    with pytest.raises(ConfigError, match=r"cannot be written.*--run-dir"):
        RunDir.create(tmp_path / "a" / "b", Config())


def test_nan_and_infinity_become_null_and_are_counted(tmp_path):
    run = RunDir.create(tmp_path, Config())
    run.log(1, {
        "loss": math.nan, "ratio/max": math.inf, "n": 3, "note": "x", "none": None,
        "float32": np.float32(0.5), "int64": np.int64(2),
    })  # fmt: skip
    text = run.metrics.read_text()
    line = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert line == {
        "step": 1, "loss": None, "ratio/max": None, "n": 3, "note": "x", "none": None,
        "float32": 0.5, "int64": 2, "nonfinite": 2,
    }  # fmt: skip


numbers = st.floats() | st.integers(-(2**60), 2**60)
records = st.dictionaries(st.text(max_size=8), numbers | st.text(max_size=8) | st.none())


@given(record=records)
def test_lines_are_strict_json_and_read_back(tmp_path_factory, record):
    record = {key: value for key, value in record.items() if key != "step"}
    path = tmp_path_factory.mktemp("j") / "x.jsonl"
    strict, num_nonfinite = to_strict({"step": 0, **record})
    append_lines(path, [strict])
    (line,) = read_lines(path)
    not_finite = [k for k, v in record.items() if isinstance(v, float) and not math.isfinite(v)]
    assert num_nonfinite == len(not_finite)
    assert line == {"step": 0, **record, **dict.fromkeys(not_finite)}


def test_texts_survive_unchanged(tmp_path):
    run = RunDir.create(tmp_path, Config())
    text = "a\ud800b\x00c\u202ed</script>\n"
    run.log_rollouts(3, [group(rollout(turns=[turn(text)]))])
    (line,) = read_lines(run.rollouts)
    assert line["rollouts"][0]["turns"][0]["text"] == text
    assert run.rollouts.read_bytes().isascii()


@pytest.mark.parametrize("rest", ['{"step": 3, "lo', '{"step": 3}', "{", '{"step": 3, "a": "ü'])
@pytest.mark.parametrize("steps", [[], [1, 2]])
def test_an_incomplete_last_line_is_skipped_and_then_removed(tmp_path, rest, steps):
    run = RunDir.create(tmp_path, Config())
    for step in steps:
        run.log(step, {"loss": 0.1})
    with run.metrics.open("a", encoding="utf-8") as file:
        file.write(rest)
    assert steps_of(run) == steps
    run.log(3, {"loss": 0.3})
    assert steps_of(run) == [*steps, 3]


def test_rewinding_leaves_every_step_once(tmp_path):
    run = RunDir.create(tmp_path, Config())
    assert run.rewind(4) == 0
    for step in range(8):
        run.log(step, {"loss": step / 3})
        run.log_rollouts(step, [group(rollout(turns=[turn("x")]))])
    before = run.metrics.read_text().splitlines()[:6]
    with run.metrics.open("a") as file:
        file.write('{"step": 8, "lo')
    assert run.rewind(5) == 2
    for step in (6, 7):
        run.log(step, {"loss": step / 3})
    assert steps_of(run) == list(range(8))
    assert run.metrics.read_text().splitlines()[:6] == before
    assert [line["step"] for line in read_lines(run.rollouts)] == list(range(6))
    assert run.rewind(-1) == 8 and steps_of(run) == []


def test_a_kill_loses_only_lines_of_its_step(tmp_path):
    run = RunDir.create(tmp_path, Config())
    for step in (1, 2):
        run.log_rollouts(step, [group(rollout(turns=[turn("x")]))] * 3)
    whole = run.rollouts.read_bytes()
    ends = [i for i, byte in enumerate(whole, 1) if byte == ord("\n")]
    assert len(ends) == 6
    for size in (ends[2], ends[2] + 9, ends[4], ends[4] + 9):
        run.rollouts.write_bytes(whole[:size])
        run.rewind(1)
        assert run.rollouts.read_bytes() == whole[: ends[2]]
        run.log_rollouts(2, [group(rollout(turns=[turn("x")]))] * 3)
        assert run.rollouts.read_bytes() == whole


@pytest.mark.parametrize("bad", ["not json\n", "[1]\n", '{"loss": 1}\n', "\n", "\xff\n"])
def test_a_damaged_line_is_an_error_with_its_number(tmp_path, bad):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + bad.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"metrics\.jsonl:2: "):
        read_metrics(tmp_path)


def test_missing_metrics_are_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: cannot be read"):
        read_metrics(tmp_path)


def test_a_line_of_rollouts_by_hand(tmp_path):
    run = RunDir.create(tmp_path, Config())
    parts = {"tool": 0.2, "hit": 0.5}
    search = turn("<tool>", 0.7, reply="<result>", reward_parts=parts, tool_calls=1)
    finished = rollout(0, [search, turn("Ida")], outcome=1.9, outcome_parts={"f1": 1.9}, time_s=2.5)
    failed = rollout(1, [search], "timeout", error="tool search: 10 s")
    credit = Credit(rule="mt_grpo", advantages=((1.5, -0.5), ()))
    run.log_rollouts(2, [group(finished, failed)], [credit], split="eval")
    first_turn = {
        "text": "<tool>", "reply": "<result>", "reward": 0.7, "reward_parts": parts,
        "advantage": 1.5, "finish": "stop", "tokens": 3, "tool_calls": 1, "tool_successes": 0,
    }  # fmt: skip
    second_turn = {
        "text": "Ida", "reply": "", "reward": None, "reward_parts": {}, "advantage": -0.5,
        "finish": "stop", "tokens": 3, "tool_calls": 0, "tool_successes": 0,
    }  # fmt: skip
    assert list(read_lines(run.rollouts)) == [{
        "step": 2, "split": "eval", "group": 0, "task_id": "q", "question": "Who?",
        "answers": ["Ida"], "rule": "mt_grpo",
        "rollouts": [
            {
                "index": 0, "status": "finished", "failed": False, "masked": False, "error": "",
                "outcome": 1.9, "outcome_parts": {"f1": 1.9}, "metrics": {}, "tool_success": 0.0,
                "time_s": 2.5, "turns": [first_turn, second_turn],
            },
            {
                "index": 1, "status": "timeout", "failed": True, "masked": False,
                "error": "tool search: 10 s", "outcome": 0.0, "outcome_parts": {}, "metrics": {},
                "tool_success": 0.0, "time_s": 0.0, "turns": [{**first_turn, "advantage": None}],
            },
        ],
    }]  # fmt: skip


# --- sinks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_sink_without_its_package_is_an_error(tmp_path, name, monkeypatch):
    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None
    )
    with pytest.raises(ConfigError, match=rf"train\.sinks: {name} is not installed.*tracking"):
        RunDir.create(tmp_path, build_config({"train": {"sinks": [name]}}))


def test_tensorboard_receives_the_metrics(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunDir.create(tmp_path, build_config({"train": {"sinks": ["tensorboard"]}})) as run:
        run.log(1, {"loss": 0.5, "bad": math.nan})
        run.log(2, {"loss": 0.25})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]


def test_a_sink_that_fails_is_dropped_and_the_run_continues(tmp_path, monkeypatch, caplog):
    calls = []

    def log(metrics, step):
        calls.append(step)
        raise OSError("no network")

    tracker = SimpleNamespace(init=lambda **options: None, log=log, finish=lambda: None)
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    with RunDir.create(tmp_path, build_config({"train": {"sinks": ["trackio"]}})) as run:
        run.log(1, {"loss": 0.5})
        run.log(2, {"loss": 0.25})
    assert calls == [1] and "no network" in caplog.text
    assert steps_of(run) == [1, 2]
