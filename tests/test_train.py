"""Whole training runs with small models and the local sampler."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import wraps
from pathlib import Path

import pytest
import torch
from training_runs import LETTERS, logged, recipe, stop_after, training_lines, weights
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen3Model

from turnfast.config.recipe import to_toml
from turnfast.envs import Demonstration, SearchEnv
from turnfast.errors import ConfigError, OutOfMemory, RolloutError, SyncError, TrainingError
from turnfast.model.tiny import write_tiny_model
from turnfast.report.trajectories import read_rollouts
from turnfast.rundir.directory import read_metrics
from turnfast.sampler.local import LocalSampler
from turnfast.sampler.open import open_sampler
from turnfast.sft import warm_start
from turnfast.train import train

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = Path(os.environ.get("TURNFAST_TEST_DATA", "/nonexistent")) / "hotpotqa"
METRICS = {
    *("step", "loss", "reward/outcome", "reward/turn", "tool_success", "exact_match"),
    *("grad_norm", "ratio/max", "logprob_gap", "tokens", "tokens_trained", "padding"),
    *("shared_prefix", "zero_signal_groups", "time/rollout", "time/score", "time/pack"),
    *("time/train", "time/sync"),
}


def logged_steps(run_dir: Path) -> list[tuple[int, str]]:
    return [
        (line["step"], "eval" if "eval/rollouts" in line else "train")
        for line in read_metrics(run_dir)
    ]


@pytest.fixture(scope="module")
def uninterrupted(letters_model, tmp_path_factory) -> Path:
    """The run directory of four steps without a stop."""
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    train(recipe(letters_model), run_dir)
    return run_dir


def test_three_steps_on_the_built_in_world(tmp_path):
    options = {
        "people": 60,
        "held_out_people": 40,
        "train_tasks": 16,
        "eval_tasks": 6,
        "popular_questions": 8,
        "demos": {"count": 300, "calls": 0.9, "popular_passes": 0},
    }
    base = {
        **LETTERS,
        "env": {"name": "lookup", "max_turns": 2, "options": options},
        "rollout": {
            "prompts_per_step": 3,
            "group_size": 4,
            "max_new_tokens": 32,
            "max_context": 192,
        },
        "train": {**LETTERS["train"], "steps": 3, "tokens_per_microbatch": 512},
        "sft": {"steps": 12, "lr": 3e-3, "batch_tokens": 1024},
    }
    warm = warm_start(recipe("tiny", base), tmp_path / "warm")
    losses = [line["loss"] for line in read_metrics(tmp_path / "warm")]
    assert len(losses) == 12 and losses[-1] < 0.85 * losses[0]

    run_dir = tmp_path / "run"
    train(recipe(warm, base), run_dir)
    steps = training_lines(run_dir)
    assert [line["step"] for line in steps] == [1, 2, 3]
    for line in steps:
        assert set(line) >= METRICS and "nonfinite" not in line
        phases = sum(line[f"time/{p}"] for p in ("rollout", "score", "pack", "train", "sync"))
        assert 0.98 * line["time/step"] <= phases <= line["time/step"] + 1e-9
        assert line["padding"] <= 0.05 and line["logprob_gap/max"] <= 1e-4
        assert line["sync_gap"] <= 1e-4
        # a step without signal takes no optimizer step
        if line["zero_signal_groups"] == 1.0:
            assert line["tokens_trained"] == line["grad_norm"] == line["lr"] == 0.0
    evaluations = [line for line in read_metrics(run_dir) if "eval/exact_match" in line]
    assert [line["step"] for line in evaluations] == [0, 2, 3]
    assert all("eval/tool_success" in line for line in evaluations)
    lines = read_rollouts(run_dir / "rollouts.jsonl")
    assert lines and "<html" in (run_dir / "report.html").read_text()[:200].lower()
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == [
        "latest",
        "step_000002",
        "step_000003",
    ]
    # a checkpoint is a model folder
    train(recipe(run_dir / "checkpoints" / "step_000003", base, train__steps=1), tmp_path / "next")


def test_every_step_has_signal_and_changes_the_weights(uninterrupted, letters_model):
    steps = training_lines(uninterrupted)
    assert all(line["grad_norm"] > 0 and line["tokens_trained"] > 0 for line in steps)
    assert all(line["ratio/max"] == 1.0 for line in steps)
    assert weights(uninterrupted, 2) != weights(uninterrupted, 4)
    assert [line["lr"] for line in steps] == [1e-2] * 4


def test_resumed_run_equals_an_uninterrupted_one(uninterrupted, letters_model, tmp_path):
    run_dir = tmp_path / "run"
    train(recipe(letters_model, train__steps=2), run_dir)
    train(recipe(letters_model), run_dir, resume=True)
    assert weights(run_dir, 4) == weights(uninterrupted, 4)
    assert logged(run_dir) == logged(uninterrupted)
    assert (run_dir / "config.1.toml").exists()


def test_run_can_be_stopped_anywhere_and_resumed(
    uninterrupted, letters_model, tmp_path, monkeypatch
):
    """The stops happen in evaluations and rollouts of the first, middle and last steps."""
    # call should_stop after every engine step, independent of the machine's speed
    monkeypatch.setattr("turnfast.sampler.awaited.POLL_SHARE", 0.0)
    run_dir = tmp_path / "run"
    reached = []
    for count in (3, 20, 9, 26, 14, 11, 40, 17, 1, 30, 25, 10**6):
        train(
            recipe(letters_model), run_dir, resume=run_dir.exists(), should_stop=stop_after(count)
        )
        newest = (run_dir / "checkpoints" / "latest").read_text().strip()
        reached.append(int(newest.removeprefix("step_")))
    assert reached == sorted(reached) and reached[0] == 0 and reached[-1] == 4, reached
    assert len(set(reached)) >= 4, reached
    assert weights(run_dir, 4) == weights(uninterrupted, 4)
    assert logged(run_dir) == logged(uninterrupted)


@pytest.mark.parametrize("steps", [2, 4])
def test_interrupted_evaluation_is_repeated(steps, uninterrupted, letters_model, tmp_path):
    """Also after the last step."""
    config = recipe(letters_model, train__steps=steps)
    run_dir = tmp_path / "run"

    def evaluates_the_last_step() -> bool:
        metrics = run_dir / "metrics.jsonl"
        return metrics.exists() and logged_steps(run_dir)[-1] == (steps, "train")

    train(config, run_dir, should_stop=evaluates_the_last_step)
    assert logged_steps(run_dir)[-1] == (steps, "train")
    assert (run_dir / "checkpoints" / f"step_{steps:06d}").exists()
    train(config, run_dir, resume=True)
    assert logged_steps(run_dir)[-1] == (steps, "eval")
    train(config, run_dir, resume=True)
    assert logged_steps(run_dir).count((steps, "eval")) == 1
    assert logged(run_dir)[0] == logged(uninterrupted)[0][: len(logged_steps(run_dir))]


def test_damaged_checkpoint_is_skipped(uninterrupted, letters_model, tmp_path, caplog):
    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted, run_dir)
    file = run_dir / "checkpoints" / "step_000004" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    train(recipe(letters_model), run_dir, resume=True)
    assert "step_000004" in caplog.text and "damaged" in caplog.text
    assert weights(run_dir, 4) == weights(uninterrupted, 4)
    assert logged(run_dir) == logged(uninterrupted)


def test_resume_without_a_checkpoint_starts_at_step_1(uninterrupted, letters_model, tmp_path):
    run_dir = tmp_path / "run"
    train(recipe(letters_model, train__steps=2), run_dir, resume=True)
    assert logged_steps(run_dir) == [(0, "eval"), (1, "train"), (2, "train"), (2, "eval")]
    assert weights(run_dir, 2) == weights(uninterrupted, 2)


def test_failed_start_leaves_the_run_directory_free(letters_model, tmp_path):
    run_dir = tmp_path / "run"
    for changes, error, text in (
        ({"model__path": "./no/such/model"}, ConfigError, "model.path: there is no folder"),
        ({"credit__rule": "mt_grop"}, ConfigError, "did you mean 'mt_grpo'"),
        ({"env__name": "letters:Leters"}, ConfigError, "did you mean 'Letters'"),
        ({"env__options": {"wait": 1}}, ConfigError, "env.options.wait: no such option"),
        (
            {"rollout__max_context": 513, "train__tokens_per_microbatch": 1024},
            ConfigError,
            r"rollout\.max_context: 513 .* = 512",
        ),
        (
            {"rollout__max_context": 9, "rollout__max_new_tokens": 8},
            RolloutError,
            r"first prompt has \d+ tokens.*max_context",
        ),
    ):
        with pytest.raises(error, match=text):
            train(recipe(letters_model, **changes), run_dir)
        assert not (run_dir / "config.toml").exists()
    train(recipe(letters_model, train__steps=1), run_dir)


def change_output(monkeypatch, change) -> None:
    """Pass the output and the keyword arguments of every forward of the tiny model to `change`."""
    forward = Qwen3Model.forward

    @wraps(forward)
    def changed(self, *args, **kwargs):
        return change(forward(self, *args, **kwargs), kwargs)

    monkeypatch.setattr(Qwen3Model, "forward", changed)


@pytest.mark.parametrize(
    ("changed", "with_grad"),
    [({}, True), ({"credit__rule": "mt_ppo"}, False), ({"loss__kl_coef": 0.1}, False)],
    ids=["gradient", "critic", "reference"],
)
def test_out_of_memory_ends_the_run_with_a_checkpoint(
    letters_model, tmp_path, monkeypatch, changed, with_grad
):
    calls = itertools.count()

    def fail(out, kwargs):
        packed = "packed_rows" in kwargs and torch.is_grad_enabled() == with_grad
        metrics = tmp_path / "run/metrics.jsonl"
        if packed and metrics.exists() and metrics.read_text().count('"loss"') == 1:
            raise torch.OutOfMemoryError(f"CUDA out of memory {next(calls)}")
        return out

    change_output(monkeypatch, fail)
    text = (
        r"lower train\.tokens_per_microbatch from 128 to 96; .*model\.checkpointing = true \(CUDA"
    )
    with pytest.raises(OutOfMemory, match=text):
        train(recipe(letters_model, train__save_every=0, **changed), tmp_path / "run")
    assert next(calls) == 1  # the forward is not repeated
    assert (tmp_path / "run/checkpoints/latest").read_text().strip() == "step_000001"


def test_environment_without_evaluation_or_training_tasks(letters_model, tmp_path, monkeypatch):
    config = recipe(letters_model, train__steps=1, env__options={"eval_words": 0})
    train(config, tmp_path / "run")
    assert logged_steps(tmp_path / "run") == [(1, "train")]
    monkeypatch.setattr("letters.WORDS", ())
    with pytest.raises(ConfigError, match="no tasks in split 'train'"):
        train(config, tmp_path / "none")


def test_too_many_failed_rollouts_keep_the_completed_steps(
    uninterrupted, letters_model, tmp_path, monkeypatch
):
    from letters import Spelling

    async def fail(self):
        raise ConnectionError("no route to the search server")

    def after_two_steps() -> bool:
        if (run_dir / "metrics.jsonl").exists() and (2, "eval") in logged_steps(run_dir):
            monkeypatch.setattr(Spelling, "finish", fail)
        return False

    run_dir = tmp_path / "run"
    config = recipe(letters_model, train__save_every=0, rollout__max_error_share=0.5)
    with pytest.raises(RolloutError, match=r"6 of 6 rollouts failed.*no route to the search"):
        train(config, run_dir, should_stop=after_two_steps)
    monkeypatch.undo()
    train(config, run_dir, resume=True)
    assert weights(run_dir, 4) == weights(uninterrupted, 4)
    assert logged(run_dir) == logged(uninterrupted)


@pytest.mark.parametrize(
    ("error", "completed"), [(TrainingError, 2), (SyncError, 3)], ids=["gradient", "sync"]
)
def test_fault_in_the_third_step_keeps_the_completed_steps(
    error, completed, uninterrupted, letters_model, tmp_path, monkeypatch
):
    """A sync fails after the update, so that its step is completed. No other checkpoint exists."""
    run_dir = tmp_path / "run"
    load_weights = LocalSampler.load_weights

    def in_the_third_step() -> bool:
        return (run_dir / "metrics.jsonl").exists() and (2, "eval") in logged_steps(run_dir)

    def make_nan(out, kwargs):
        if error is TrainingError and "packed_rows" in kwargs and in_the_third_step():
            out.last_hidden_state = out.last_hidden_state * float("nan")
        return out

    def fail_to_load(self, named_weights):
        if error is SyncError and in_the_third_step():
            raise SyncError("the engine is gone")
        load_weights(self, named_weights)

    change_output(monkeypatch, make_nan)
    monkeypatch.setattr(LocalSampler, "load_weights", fail_to_load)
    config = recipe(letters_model, train__save_every=0)
    with pytest.raises(error):
        train(config, run_dir)
    monkeypatch.undo()
    assert (run_dir / "checkpoints/latest").read_text().strip() == f"step_{completed:06d}"
    train(config, run_dir, resume=True)
    assert weights(run_dir, 4) == weights(uninterrupted, 4)
    if error is TrainingError:  # a failed sync leaves no line of its step
        assert logged(run_dir) == logged(uninterrupted)


@pytest.mark.parametrize("stale", [False, True])
def test_stale_sampler_weights_end_the_run(stale, letters_model, tmp_path, monkeypatch):
    """A sampler with its own weights that keeps those of the start: the tokens of the second step
    show it, because no probe is due after the first."""
    load_weights = LocalSampler.load_weights
    loads = []

    def open_copy(*args, **options):
        return open_sampler(*args, **{**options, "overlap": True})

    def load_first_weights(self, named_weights):
        loads.append([(name, tensor.detach().clone()) for name, tensor in named_weights])
        load_weights(self, loads[0 if stale and len(loads) == 2 else -1])

    monkeypatch.setattr("turnfast.run.open_sampler", open_copy)
    monkeypatch.setattr(LocalSampler, "load_weights", load_first_weights)
    run_dir = tmp_path / "run"
    config = recipe(letters_model, train__save_every=0, train__eval_every=0)
    if not stale:
        train(config, run_dir)
        lines = training_lines(run_dir)
        assert all(line["logprob_gap/max"] <= 1e-4 for line in lines) and len(lines) == 4
        return
    with pytest.raises(SyncError, match="of this step"):
        train(config, run_dir)
    assert (run_dir / "checkpoints/latest").read_text().strip() == "step_000001"
    assert len(training_lines(run_dir)) == 1


def test_reused_logprobs_must_be_near_those_of_the_trainer(letters_model, tmp_path):
    def run(limit: float) -> None:
        changed = {"loss__old_logprobs": "sampler", "loss__max_logprob_gap": limit}
        train(recipe(letters_model, train__steps=2, **changed), tmp_path / str(limit))

    run(1.0)
    assert len(training_lines(tmp_path / "1.0")) == 2
    with pytest.raises(TrainingError, match=r"loss\.max_logprob_gap: .*more than 1e-12"):
        run(1e-12)


CHILD = "from turnfast.cli import main; raise SystemExit(main())"


def test_signal_ends_a_run_with_a_checkpoint(uninterrupted, letters_model, tmp_path):
    """The signal arrives in a rollout while all trajectories wait for the environment."""
    run_dir = tmp_path / "run"
    recipe_file = tmp_path / "slow.toml"
    options = {"wait_s": 0.2}
    recipe_file.write_text(to_toml(recipe(letters_model, env__options=options)))
    words = ["train", str(recipe_file), "--run-dir", str(run_dir)]
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, *words],
        cwd=Path(__file__).parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        try:
            assert child.stdout is not None
            for line in child.stdout:
                if line.startswith("train 1/4"):
                    child.terminate()
                    break
            _, errors = child.communicate(timeout=120)
        finally:
            child.kill()
    assert child.returncode == 128 + signal.SIGTERM
    assert errors.count("\n") == 1 and "SIGTERM" in errors and "--resume" in errors
    assert (run_dir / "checkpoints" / "step_000001" / "manifest.json").exists()
    assert (run_dir / "report.html").exists()
    train(recipe(letters_model, env__options=options), run_dir, resume=True)
    assert weights(run_dir, 4) == weights(uninterrupted, 4)


def test_llama_in_float32_and_bfloat16(letters_model, tmp_path):
    """The head has its own weights; AdamW keeps float32 copies of bfloat16 weights."""
    tokenizer = AutoTokenizer.from_pretrained(letters_model)
    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    folder = tmp_path / "llama"
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for dtype, gap in (("float32", 1e-4), ("bfloat16", 0.25)):
        run_dir = tmp_path / dtype
        train(recipe(folder, model__dtype=dtype, train__steps=1, train__eval_every=0), run_dir)
        (step,) = training_lines(run_dir)
        assert step["grad_norm"] > 0 and step["logprob_gap/max"] <= gap
        saved = LlamaForCausalLM.from_pretrained(run_dir / "checkpoints" / "step_000001")
        assert any(
            not torch.equal(after, before)
            for after, before in zip(saved.parameters(), llama.parameters(), strict=True)
        )


def test_second_update_of_a_step_has_a_ratio(letters_model, tmp_path):
    config = recipe(
        letters_model,
        train__steps=1,
        train__updates_per_step=2,
        loss__ratio="turn",
        loss__is_cap=2.0,
        loss__normalizer="constant",
    )
    train(config, tmp_path / "run")
    (step,) = training_lines(tmp_path / "run")
    assert step["ratio/max"] > 1.0


@pytest.mark.skipif(not DATA.is_dir(), reason="TURNFAST_TEST_DATA has no hotpotqa folder")
def test_two_steps_on_real_questions(tmp_path):
    """A tiny model that was tuned on valid and malformed calls of the search tool."""
    files = {name: str(DATA / f"{name}.jsonl") for name in ("questions", "corpus")}
    options = {**files, "reasoning": False, "instructions": "Search, then answer."}
    call = '<tool>{"name": "search", "args": {"query": "film"}}</tool>'
    malformed = '<tool>{"name": "search"}</tool>'

    class SearchWithDemonstrations(SearchEnv):
        def corpus(self):
            lines = Path(files["corpus"]).read_text().splitlines()[:200]
            return [*(json.loads(line)["text"] for line in lines), *[call, malformed] * 100]

        def demonstrations(self, seed):
            return [
                Demonstration(
                    messages=(*self.first_messages(task), {"role": "assistant", "content": reply})
                )
                for task in self.tasks("train")[:20]
                for reply in (call, malformed)
            ]

    env = SearchWithDemonstrations(**options)
    base = {
        **LETTERS,
        "env": {"name": "search", "max_turns": 2, "options": options},
        "rollout": {
            "prompts_per_step": 3,
            "group_size": 3,
            "max_new_tokens": 48,
            "max_context": 1024,
        },
        "train": {**LETTERS["train"], "steps": 2, "eval_every": 0, "tokens_per_microbatch": 4096},
        "sft": {"steps": 60, "lr": 1e-2, "batch_tokens": 512},
    }
    folder = write_tiny_model(
        tmp_path / "tiny", env.corpus(), seed=0, vocab_size=600, layers=2, width=64
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys.modules[__name__],
            "SearchWithDemonstrations",
            SearchWithDemonstrations,
            raising=False,
        )
        shown = {**base["env"], "name": f"{__name__}:SearchWithDemonstrations"}
        warm = warm_start(recipe(folder, {**base, "env": shown}), tmp_path / "warm")
    train(recipe(warm, base), tmp_path / "run")
    steps = training_lines(tmp_path / "run")
    assert [line["step"] for line in steps] == [1, 2]
    assert sum(line["grad_norm"] for line in steps) > 0
    assert sum(line["tool_success"] for line in steps) > 0
    replies = [
        turn["reply"]
        for line in map(json.loads, (tmp_path / "run" / "rollouts.jsonl").open())
        for rollout in line["rollouts"]
        for turn in rollout["turns"]
    ]
    assert any("<result>" in reply and "Error" not in reply for reply in replies)
