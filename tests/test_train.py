"""The loop from end to end, on small models that sample for themselves."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_runs import LETTERS, logged, recipe, stop_after, training_lines, weights
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import turnfast.run
from turnfast.cli import main
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
NAMED = {
    *("step", "loss", "reward/outcome", "reward/turn", "tool_success", "exact_match"),
    *("grad_norm", "ratio/max", "logprob_gap", "tokens", "tokens_trained", "padding"),
    *("shared_prefix", "zero_signal_groups", "time/rollout", "time/score", "time/pack"),
    *("time/train", "time/sync"),
}


def lines_of(run_dir: Path) -> list[tuple[int, str]]:
    return [
        (line["step"], "eval" if "eval/rollouts" in line else "train")
        for line in read_metrics(run_dir)
    ]


@pytest.fixture(scope="module")
def straight(letters_model, tmp_path_factory) -> Path:
    """Four steps without a break."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
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
        assert set(line) >= NAMED and "nonfinite" not in line
        phases = sum(line[f"time/{p}"] for p in ("rollout", "score", "pack", "train", "sync"))
        assert 0.98 * line["time/step"] <= phases <= line["time/step"] + 1e-9
        assert line["padding"] <= 0.05 and line["logprob_gap/max"] <= 1e-4
        assert line["sync_gap"] <= 1e-4
        # a model that knows nothing yet earns nothing: a step without signal is no update
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
    # the folder of a checkpoint is a model
    train(recipe(run_dir / "checkpoints" / "step_000003", base, train__steps=1), tmp_path / "next")


def test_steps_change_the_weights_and_carry_signal(straight, letters_model):
    steps = training_lines(straight)
    assert all(line["grad_norm"] > 0 and line["tokens_trained"] > 0 for line in steps)
    assert all(line["ratio/max"] == 1.0 for line in steps)
    assert weights(straight, 2) != weights(straight, 4)
    assert [line["lr"] for line in steps] == [1e-2] * 4


def test_a_run_on_two_legs_is_the_run_on_one(straight, letters_model, tmp_path):
    run_dir = tmp_path / "run"
    train(recipe(letters_model, train__steps=2), run_dir)
    train(recipe(letters_model), run_dir, resume=True)
    assert weights(run_dir, 4) == weights(straight, 4)
    assert logged(run_dir) == logged(straight)
    assert (run_dir / "config.1.toml").exists()


def test_wherever_a_run_is_stopped_a_resume_makes_it_whole(
    straight, letters_model, tmp_path, monkeypatch
):
    """The stops fall into evaluations and rollouts, the first, a middle and the last ones."""
    # asked after every engine step, however fast the machine is
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
    assert weights(run_dir, 4) == weights(straight, 4)
    assert logged(run_dir) == logged(straight)


@pytest.mark.parametrize("steps", [2, 4])
def test_an_evaluation_that_was_cut_short_is_made_up_for(steps, straight, letters_model, tmp_path):
    """Also the last one, after which there is no step left."""
    config = recipe(letters_model, train__steps=steps)
    run_dir = tmp_path / "run"
    done = []

    def in_the_evaluation_after_the_last_step() -> bool:
        metrics = run_dir / "metrics.jsonl"
        done.append(metrics.exists() and lines_of(run_dir)[-1] == (steps, "train"))
        return done[-1]

    train(config, run_dir, should_stop=in_the_evaluation_after_the_last_step)
    assert lines_of(run_dir)[-1] == (steps, "train")
    assert (run_dir / "checkpoints" / f"step_{steps:06d}").exists()
    train(config, run_dir, resume=True)
    assert lines_of(run_dir)[-1] == (steps, "eval")
    train(config, run_dir, resume=True)
    assert lines_of(run_dir).count((steps, "eval")) == 1
    assert logged(run_dir)[0] == logged(straight)[0][: len(lines_of(run_dir))]


def test_a_damaged_checkpoint_is_passed_over(straight, letters_model, tmp_path, caplog):
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir)
    file = run_dir / "checkpoints" / "step_000004" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    train(recipe(letters_model), run_dir, resume=True)
    assert "step_000004" in caplog.text and "damaged" in caplog.text
    assert weights(run_dir, 4) == weights(straight, 4)
    assert logged(run_dir) == logged(straight)


def test_a_run_directory_is_not_used_twice(straight, letters_model, tmp_path, capsys):
    before = logged(straight)
    recipe_file = tmp_path / "letters.toml"
    recipe_file.write_text(to_toml(recipe(letters_model)))
    assert main(["train", str(recipe_file), "--run-dir", str(straight)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert logged(straight) == before


def test_resume_of_nothing_starts_at_the_beginning(straight, letters_model, tmp_path):
    run_dir = tmp_path / "run"
    train(recipe(letters_model, train__steps=2), run_dir, resume=True)
    assert lines_of(run_dir) == [(0, "eval"), (1, "train"), (2, "train"), (2, "eval")]
    assert weights(run_dir, 2) == weights(straight, 2)


def test_a_failed_start_leaves_the_folder_free(letters_model, tmp_path):
    run_dir = tmp_path / "run"
    for wrong, text in (
        ({"model__path": "./no/such/model"}, "model.path: there is no folder"),
        ({"credit__rule": "mt_grop"}, "did you mean 'mt_grpo'"),
        ({"env__name": "letters:Leters"}, "did you mean 'Letters'"),
        ({"env__options": {"wait": 1}}, "env.options.wait: no such option"),
        ({"rollout__max_context": 9, "rollout__max_new_tokens": 8}, None),
    ):
        if text is None:
            with pytest.raises(RolloutError, match=r"first prompt has \d+ tokens.*max_context"):
                train(recipe(letters_model, **wrong), run_dir)
        else:
            with pytest.raises(ConfigError, match=text):
                train(recipe(letters_model, **wrong), run_dir)
        assert not (run_dir / "config.toml").exists()
    train(recipe(letters_model, train__steps=1), run_dir)


def test_rows_beyond_the_model_are_refused_before_anything_starts(letters_model, tmp_path):
    config = recipe(letters_model, rollout__max_context=513, train__tokens_per_microbatch=1024)
    with pytest.raises(ConfigError, match=r"rollout\.max_context: 513 .* = 512"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("changed", "with_grad"),
    [({}, True), ({"credit__rule": "mt_ppo"}, False), ({"loss__kl_coef": 0.1}, False)],
    ids=["gradient", "critic", "reference"],
)
def test_out_of_memory_ends_the_run_with_a_checkpoint(
    letters_model, tmp_path, monkeypatch, changed, with_grad
):
    load, calls = turnfast.run.load_policy, itertools.count()

    def fail(module, args, kwargs) -> None:
        packed = "packed_rows" in kwargs and torch.is_grad_enabled() == with_grad
        if packed and (tmp_path / "run/metrics.jsonl").read_text().count('"loss"') == 1:
            raise torch.OutOfMemoryError(f"CUDA out of memory {next(calls)}")

    def load_limited(*args):
        policy = load(*args)
        policy.model.base_model.register_forward_pre_hook(fail, with_kwargs=True)
        return policy

    monkeypatch.setattr("turnfast.run.load_policy", load_limited)
    monkeypatch.setattr("turnfast.update.reference.load_policy", load_limited)
    text = (
        r"lower train\.tokens_per_microbatch from 128 to 96; .*model\.checkpointing = true \(CUDA"
    )
    with pytest.raises(OutOfMemory, match=text):
        train(recipe(letters_model, train__save_every=0, **changed), tmp_path / "run")
    assert next(calls) == 1  # not tried again
    assert (tmp_path / "run/checkpoints/latest").read_text().strip() == "step_000001"


def test_an_environment_without_evaluation_or_training_tasks(letters_model, tmp_path, monkeypatch):
    config = recipe(letters_model, train__steps=1, env__options={"eval_words": 0})
    train(config, tmp_path / "run")
    assert lines_of(tmp_path / "run") == [(1, "train")]
    monkeypatch.setattr("letters.WORDS", ())
    with pytest.raises(ConfigError, match="no tasks in split 'train'"):
        train(config, tmp_path / "none")


def test_too_many_failures_keep_the_steps_that_were_done(
    straight, letters_model, tmp_path, monkeypatch
):
    from letters import Spelling

    async def refuse(self):
        raise ConnectionError("no route to the search server")

    def after_two_steps() -> bool:
        if (run_dir / "metrics.jsonl").exists() and (2, "eval") in lines_of(run_dir):
            monkeypatch.setattr(Spelling, "finish", refuse)
        return False

    run_dir = tmp_path / "run"
    config = recipe(letters_model, train__save_every=0, rollout__max_error_share=0.5)
    with pytest.raises(RolloutError, match=r"6 of 6 rollouts failed.*no route to the search"):
        train(config, run_dir, should_stop=after_two_steps)
    monkeypatch.undo()
    train(config, run_dir, resume=True)
    assert weights(run_dir, 4) == weights(straight, 4)
    assert logged(run_dir) == logged(straight)


@pytest.mark.parametrize("fault", ["gradient", "memory", "sync"])
def test_a_fault_in_a_step_keeps_the_steps_that_were_done(
    fault, straight, letters_model, tmp_path, monkeypatch
):
    """A gradient that is no number, no memory, an engine that takes no weights: in the third step,
    where there is no other checkpoint. A step whose weights are not handed over is done, too."""
    run_dir = tmp_path / "run"
    load = turnfast.run.load_policy

    def in_the_third_step() -> bool:
        return (run_dir / "metrics.jsonl").exists() and (2, "eval") in lines_of(run_dir)

    def check(module, args, kwargs, out):
        if fault != "sync" and "packed_rows" in kwargs and in_the_third_step():
            if fault == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory")
            out.last_hidden_state = out.last_hidden_state * float("nan")
        return out

    def load_policy(*args):
        policy = load(*args)
        policy.model.base_model.register_forward_hook(check, with_kwargs=True)
        return policy

    take = LocalSampler.load_weights

    def load_weights(self, named_weights):
        if fault == "sync" and in_the_third_step():
            raise SyncError("the engine is gone")
        take(self, named_weights)

    monkeypatch.setattr("turnfast.run.load_policy", load_policy)
    monkeypatch.setattr(LocalSampler, "load_weights", load_weights)
    config = recipe(letters_model, train__save_every=0)
    error = {"gradient": TrainingError, "memory": OutOfMemory, "sync": SyncError}[fault]
    with pytest.raises(error):
        train(config, run_dir)
    monkeypatch.undo()
    done = 3 if fault == "sync" else 2
    assert (run_dir / "checkpoints/latest").read_text().strip() == f"step_{done:06d}"
    train(config, run_dir, resume=True)
    assert weights(run_dir, 4) == weights(straight, 4)
    if fault != "sync":  # whose third step has no line
        assert logged(run_dir) == logged(straight)


@pytest.mark.parametrize("ignored", [False, True])
def test_nothing_is_learned_from_tokens_of_other_weights(
    ignored, letters_model, tmp_path, monkeypatch
):
    """A sampler with weights of its own, which does or does not take those of the first step. No
    probe is due then: the tokens of the second step tell."""
    take = LocalSampler.load_weights
    loads = []

    def open_copy(*args, **options):
        return open_sampler(*args, **{**options, "overlap": True})

    def load_weights(self, named_weights):
        named = [(name, tensor.detach().clone()) for name, tensor in named_weights]
        loads.append(named)
        take(self, loads[0] if ignored and len(loads) == 2 else named)

    monkeypatch.setattr("turnfast.run.open_sampler", open_copy)
    monkeypatch.setattr(LocalSampler, "load_weights", load_weights)
    run_dir = tmp_path / "run"
    config = recipe(letters_model, train__save_every=0, train__eval_every=0)
    if not ignored:
        train(config, run_dir)
        lines = training_lines(run_dir)
        assert all(line["logprob_gap/max"] <= 1e-4 for line in lines) and len(lines) == 4
        return
    with pytest.raises(SyncError, match="of this step"):
        train(config, run_dir)
    assert (run_dir / "checkpoints/latest").read_text().strip() == "step_000001"
    assert len(training_lines(run_dir)) == 1


def test_reused_log_probs_must_be_close_to_the_trainer(letters_model, tmp_path):
    def run(name: str, limit: float) -> None:
        changed = {"loss__old_logprobs": "sampler", "loss__max_logprob_gap": limit}
        train(recipe(letters_model, train__steps=2, **changed), tmp_path / name)

    run("within", 1.0)
    assert len(training_lines(tmp_path / "within")) == 2
    with pytest.raises(TrainingError, match=r"loss\.max_logprob_gap: .*more than 1e-12"):
        run("beyond", 1e-12)


CHILD = "from turnfast.cli import main; raise SystemExit(main())"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_in_order(number, straight, letters_model, tmp_path):
    """The signal falls into a rollout whose trajectories all wait for the environment."""
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
                    child.send_signal(number)
                    break
            _, errors = child.communicate(timeout=120)
        finally:
            child.kill()
    assert child.returncode == 128 + number
    assert errors.count("\n") == 1 and number.name in errors and "--resume" in errors
    assert (run_dir / "checkpoints" / "step_000001" / "manifest.json").exists()
    assert (run_dir / "report.html").exists()
    train(recipe(letters_model, env__options=options), run_dir, resume=True)
    assert weights(run_dir, 4) == weights(straight, 4)


def test_another_family_and_bfloat16(letters_model, tmp_path):
    """A Llama with a head of its own, trained in bfloat16 with float32 masters."""
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
            not torch.equal(ours, theirs)
            for ours, theirs in zip(saved.parameters(), llama.parameters(), strict=True)
        )


def test_several_updates_per_step_see_a_ratio(letters_model, tmp_path):
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
    """A tiny model that has learned to search for one word, and every other time for none."""
    files = {name: str(DATA / f"{name}.jsonl") for name in ("questions", "corpus")}
    options = {**files, "reasoning": False, "instructions": "Search, then answer."}
    call = '<tool>{"name": "search", "args": {"query": "film"}}</tool>'
    torn = '<tool>{"name": "search"}</tool>'

    class Shown(SearchEnv):
        def corpus(self):
            lines = Path(files["corpus"]).read_text().splitlines()[:200]
            return [*(json.loads(line)["text"] for line in lines), *[call, torn] * 100]

        def demonstrations(self, seed):
            return [
                Demonstration(
                    messages=(*self.first_messages(task), {"role": "assistant", "content": said})
                )
                for task in self.tasks("train")[:20]
                for said in (call, torn)
            ]

    env = Shown(**options)
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
        patch.setattr(sys.modules[__name__], "Shown", Shown, raising=False)
        shown = {**base["env"], "name": f"{__name__}:Shown"}
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
