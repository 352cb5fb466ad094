"""The command line: exit codes, one-line errors, no traceback unless asked for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from turnfast.cli import main, stop_on_signals
from turnfast.model.tiny import write_tiny_model

SMALL = """
[env]
name = "letters:Letters"
max_turns = 2
[rollout]
prompts_per_step = 2
group_size = 2
max_new_tokens = 6
max_context = 96
[sampler]
backend = "local"
[train]
steps = 1
eval_tasks = 2
device = "cpu"
[sft]
steps = 2
"""
CHILD = "from turnfast.cli import main; raise SystemExit(main())"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Work in an empty folder; `letters` can be imported from there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return tmp_path


@pytest.fixture
def recipe(folder) -> str:
    (folder / "small.toml").write_text(SMALL)
    return "small.toml"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("cli") / "model"
    corpus = ["user Say ulm. assistant oslo ida bela koru"] * 9
    return str(write_tiny_model(path, corpus, seed=0, vocab_size=300, layers=1, width=32))


@pytest.fixture
def run(capsys):
    """A function that runs a command and returns its exit code and stderr."""

    def call(*words: str) -> tuple[int, str]:
        try:
            code = main(words)
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, capsys.readouterr().err

    return call


def test_help_is_fast_and_does_not_load_torch():
    before = os.times()
    child = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", CHILD, "--help"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    after = os.times()
    assert child.returncode == 0 and "train" in child.stdout
    loaded = {line.split("|")[-1].strip() for line in child.stderr.splitlines()}
    assert not loaded & {"torch", "transformers", "vllm", "numpy", "matplotlib"}
    assert sum(after[2:4]) - sum(before[2:4]) < 0.5  # CPU seconds of the child


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("recipes", "demo "),
        ("fields", "--loss.clip-high"),
        ("train --help", "--resume"),
        ("--version", "0."),
    ],
)
def test_commands_that_only_print(command, text, capsys):
    try:
        assert main(command.split()) == 0
    except SystemExit as stop:
        assert stop.code == 0
    assert text in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("", "COMMAND"),
        ("trian demo", "invalid choice: 'trian'"),
        ("train", "recipe"),
        ("train demoo", "turnfast: demoo: no such recipe; did you mean 'demo'?"),
        ("train small.toml --lr 1", "--lr 1; did you mean 'optim.lr' or 'sft.lr'?"),
        ("train small.toml more", "unrecognised arguments: more"),
        ("fields --train.steps 3", "takes no recipe fields"),
        ("train small.toml --train.steps", "--train.steps: a value is missing"),
        ("train small.toml --.x 1", "--.x: expected a section and a field"),
        # flags are accepted in any position
        ("train small.toml --train.stesp 3", "--train.stesp: no such field; did you mean"),
        ("train --train.stesp 3 small.toml", "--train.stesp: no such field; did you mean"),
        ("--train.stesp=3 train small.toml", "--train.stesp: no such field; did you mean"),
        ("train small.toml --env.name lokup", "did you mean 'lookup'?"),
        ("train small.toml --env.name leters:Letters", "no module 'leters'"),
        ("train small.toml --env.name letters:letters", "did you mean 'Letters'?"),
        ("train small.toml --env.options.wait 1", "did you mean 'wait_s'?"),
        ("train small.toml --env.options.wait_s x", "env.options.wait_s: "),
        ("train small.toml --env.rewards judge", "env.rewards: expected a list"),
        ("train small.toml --env.rewards=[{function='f',wieght=1}]", "did you mean 'weight'?"),
        ("train small.toml --credit.rule mtgrpo", "did you mean 'mt_grpo'?"),
        ("train small.toml --credit.options.std 1", "credit.options.std: "),
        ("train small.toml --model.path ./none", "model.path: there is no folder ./none"),
        ("train small.toml --model.path a/b/c", "model.path: there is no folder a/b/c"),
        ("eval small.toml --model.path /none/here", "there is no folder /none/here"),
        ("sft small.toml --env.options.eval_words=x", "env.options.eval_words: "),
        ("report nowhere", "nowhere"),
        ("report small.toml", "small.toml: no such run directory"),
        ("train small.toml --loss.impl triton", "loss.impl: 'triton' is not available"),
    ],
)
def test_mistakes_exit_with_code_2_and_name_the_cause(run, recipe, command, text):
    words = command.split()
    code, errors = run(*words)
    assert code == 2 and text in errors and "Traceback" not in errors
    if words[:1] == ["train"]:
        assert run("train", "--dry-run", *words[1:]) == (code, errors)
    assert not Path("runs").exists() or not list(Path("runs").rglob("config.toml"))


def test_a_mistake_in_the_file_names_the_file(run, folder):
    (folder / "wrong.toml").write_text("[trian]\nsteps = 3\n")
    code, errors = run("train", "wrong.toml")
    assert code == 2
    assert errors == "turnfast: wrong.toml: trian: no such field; did you mean 'train'?\n"


def test_errors_of_the_search_recipe(run, folder):
    (folder / "corpus.jsonl").write_text('{"title": "Ida", "text": "Ida wrote Ulm."}\n')
    (folder / "bad.jsonl").write_text(
        '{"title": "Ida", "text": "Ida wrote Ulm."}\n{"title": "Ulm"}'
    )
    lines = [f'{{"id": "{i}", "question": "Who?", "answers": ["Ida"]}}\n' for i in range(4)]
    (folder / "questions.jsonl").write_text("".join(lines))
    (folder / "empty").mkdir()
    files = {"questions": "questions.jsonl", "corpus": "corpus.jsonl"}
    for changes, text in (
        ({}, "model.path: 'tiny' trains its tokenizer on"),
        ({"model.path": "./empty"}, "model.path: empty cannot be loaded as a model"),
        ({"env.options.corpus": "bad.jsonl"}, "bad.jsonl:2: field 'text' is missing; found: title"),
        ({"env.options.questions": "absent.jsonl"}, "absent.jsonl: No such file"),
        ({"env.options.questions": None}, "env.options.questions"),
    ):
        fields = {f"env.options.{name}": file for name, file in files.items()} | changes
        words = [f"--{name}={value}" for name, value in fields.items() if value is not None]
        code, errors = run("train", "demo", "--env.options={}", "--env.name=search", *words)
        assert code == 2 and text in errors and errors.count("\n") == 1, errors


WORLD = """
from turnfast.envs import Outcome, Step, Task

class World:
    tools = ()
    native_calls = False

    def tasks(self, split):
        return [Task(id=split, question="Who?")] * 4

    def episode(self, task):
        return self

    async def start(self):
        return [{"role": "user", "content": "Who?"}]

    async def step(self, text):
        return Step(done=True)

    async def finish(self):
        return Outcome()
"""


@pytest.fixture
def world(folder, monkeypatch, request):
    """A user's environment with one method replaced."""
    (folder / "world.py").write_text(WORLD + request.param)
    monkeypatch.delitem(sys.modules, "world", raising=False)


@pytest.mark.parametrize(
    ("world", "text"),
    [
        ("raise SystemExit(3)", "env.name: 'world' exits when imported, with 3"),
        ("    def tasks(self, split): return ['Who?']", "tasks('train') contains 'Who?'; each"),
        ("    def tasks(self, split): return []", "has no tasks in split 'train'"),
        ("    def __init__(self, book): pass", "env.options.book: this option is required"),
    ],
    indirect=["world"],
)
@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_environment_that_cannot_start(run, recipe, world, text, more):
    code, errors = run("train", recipe, "--env.name", "world:World", *more)
    assert code == 2 and text in errors and errors.count("\n") == 1


CORPUS = """
    def demonstrations(self, seed): return []
    def corpus(self): raise """
FAILURE = """
def failure():
    error = ValueError("no head")
    error.add_note("model.path: doge\\x1b fails")
    return error
"""


@pytest.mark.parametrize(
    ("world", "text"),
    [
        (CORPUS + "KeyError('a\\nb')", r"KeyError: 'a\nb' (world.py:24)"),
        (CORPUS + "ValueError('a\\n\\x1b[2Jb')", "ValueError: a \\x1b[2Jb (world.py:24)"),
        (CORPUS + "RuntimeError", "RuntimeError (world.py:24)"),
        (
            CORPUS + "OSError(28, 'No space left on device', 'x.bin')",
            "OSError: No space left on device: 'x.bin' (world.py:24)",
        ),
        (CORPUS + "OSError('lost')", "OSError: lost (world.py:24)"),
        ("def broken(:", "SyntaxError: invalid syntax (world.py, line 22)"),
        ("    def tasks(self, split): return 1 / 0", "ZeroDivisionError: division by zero (wo"),
        (
            "    def __init__(self): raise ValueError('too deep')",
            "ValueError: too deep (world.py:22)",
        ),
        # the innermost frame belongs to the standard library; the one that called it is named
        (CORPUS + "ValueError(__import__('json').loads('{'))", "(world.py:24)"),
    ],
    indirect=["world"],
)
def test_other_exceptions_are_one_line_with_type_text_and_place(run, recipe, world, text):
    words = ["train", recipe, "--env.name", "world:World"]
    code, errors = run(*words)
    assert code == 1 and errors.count("\n") == 1 and "--traceback" in errors
    assert errors.startswith("turnfast: ") and text in errors
    for more in (["--traceback", *words], [*words, "--traceback"]):
        with pytest.raises(Exception) as raised:
            main(more)
        assert type(raised.value).__name__ in errors


@pytest.mark.parametrize("world", [CORPUS + "failure()\n" + FAILURE], indirect=True)
def test_notes_of_an_exception_are_printed(run, recipe, world):
    code, errors = run("train", recipe, "--env.name", "world:World")
    assert code == 1
    first, note = errors.splitlines()
    assert first.startswith("turnfast: ValueError: no head (world.py:24)")
    assert note == "model.path: doge\\x1b fails"


@pytest.mark.parametrize(
    ("world", "text"),
    [
        ("    async def step(self, text): return 1 / 0", "ZeroDivisionError: division by zero (wo"),
        ("    async def step(self, text): raise SystemExit(3)", "SystemExit: 3 (world.py:2"),
        ("    async def step(self, text): return None", "step() returned None, expected Step"),
        ("    async def step(self, text): return Step(reward=float('nan'))", "turn reward is nan"),
        ("    async def step(self, text): return Step(messages=('no',))", "the message 'no'; each"),
        ("    async def start(self): return [{'role': 'user'}]", "the message {'role': 'user'}"),
        ("    async def finish(self): return 1.0", "finish() returned 1.0, expected Outcome"),
        ("    async def finish(self): return Outcome(reward=None)", "outcome is None"),
    ],
    indirect=["world"],
)
def test_failures_of_the_environment_end_the_run(run, recipe, model, world, text):
    words = ["--env.name", "world:World", "--model.path", model]
    code, errors = run("train", recipe, *words)
    assert code == 1 and "2 of 2 rollouts failed" in errors and text in errors
    assert errors.count("\n") == 1


def test_missing_sink_leaves_the_run_directory_free(run, recipe, model, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    words = ["train", recipe, "--model.path", model]
    code, errors = run(*words, "--train.sinks=['wandb']")
    assert code == 2 and "wandb is not installed" in errors
    assert run(*words)[0] == 0


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signals_become_a_request_and_handlers_are_restored(name):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with stop_on_signals() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.Signals[name])
        assert stop() and stop.reason == name
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert before == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


@pytest.mark.parametrize("command", ["sft", "eval"])
def test_commands_of_one_process_reject_torchrun(run, recipe, command, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, errors = run(command, recipe)
    assert code == 2 and f"WORLD_SIZE: `turnfast {command}` runs in one process" in errors
    assert not Path("runs").exists()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert "WORLD_SIZE" not in run(command, recipe, "--model.path", "./absent")[1]


def test_sft_train_eval_and_report(recipe, capsys):
    assert main(["sft", recipe]) == 0
    assert capsys.readouterr().out.endswith("model: runs/small-sft/model\n")
    assert main(["--model.path", "runs/small-sft/model", "train", recipe]) == 0
    out = capsys.readouterr().out
    assert out.startswith("sampler  local on cpu, ") and "report  runs/small/report.html" in out

    evaluation = ["eval", recipe, "--model.path", "runs/small/checkpoints/step_000001"]
    logged = json.loads(Path("runs/small/metrics.jsonl").read_text().splitlines()[-1])
    for split, options in (("eval", []), ("train", ["--split", "train", "--sampled"])):
        assert main([*evaluation, *options, "--out", "deep/rollouts.jsonl"]) == 0
        metrics = json.loads(capsys.readouterr().out)
        assert metrics["eval/rollouts"] == 2 and "eval/exact_match" in metrics
        if split == "eval":
            assert metrics["eval/reward/turn"] == logged["eval/reward/turn"]
        lines = Path("deep/rollouts.jsonl").read_text().splitlines()
        assert [json.loads(line)["task_id"].split("-")[0] for line in lines] == [split, split]

    Path("runs/small/report.html").unlink()
    assert main(["report", "runs/small"]) == 0
    assert Path("runs/small/report.html").exists()

    # --resume needs a folder of the same command, and a run directory is not a model
    assert main(["train", recipe, "--run-dir", "runs/small-sft", "--resume"]) == 2
    assert "holds a run of `turnfast sft`" in capsys.readouterr().err
    assert main(["eval", recipe, "--model.path", "runs/small"]) == 2
    assert "use one of runs/small/checkpoints/step_*" in capsys.readouterr().err

    assert main(["train", recipe, "--model.path", "runs/small-sft/model"]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main(["train", recipe, "--model.path", "runs/small-sft/model", "--resume"]) == 0


def test_evaluation_writes_only_the_file_of_out(recipe, folder, capsys):
    """The built-in model is written to a temporary folder; an unusable --out is an error."""
    assert main(["eval", recipe]) == 0
    json.loads(capsys.readouterr().out)
    assert [path.name for path in folder.iterdir()] == ["small.toml"]
    assert main(["eval", recipe, "--out", "small.toml/x.jsonl"]) == 2
    assert "--out small.toml/x.jsonl: cannot be written" in capsys.readouterr().err
