"""Supervised fine-tuning: gradient of the negative log-likelihood, resuming, errors in the data."""

from __future__ import annotations

import json
import shutil
from itertools import islice
from pathlib import Path

import pytest
import torch
from training_runs import stop_after

from turnfast.config.recipe import build_config, load_config
from turnfast.config.schema import LossConfig, OptimConfig, SftConfig
from turnfast.envs import Demonstration
from turnfast.errors import ConfigError, TrainingError
from turnfast.packing.pack import batch_of
from turnfast.packing.rows import Rows, rows_of
from turnfast.rundir.checkpoint import newest_complete
from turnfast.rundir.directory import read_metrics
from turnfast.sft import (
    demonstration_rows,
    demonstration_turns,
    sft_batches,
    sft_optimizer,
    warm_start,
)
from turnfast.update.learner import Learner
from turnfast.update.optimizer import Optimizer
from turnfast.update.update import update

LONG = Demonstration(
    messages=(
        {"role": "user", "content": "Who wrote Ulm?"},
        {"role": "assistant", "content": "<tool>Ulm</tool>"},
        {"role": "user", "content": "Ida wrote <|im_end|> Ulm."},
        {"role": "assistant", "content": "Ida"},
    )
)
SHORT = Demonstration(
    messages=(
        {"role": "user", "content": "Oslo?"},
        {"role": "assistant", "content": "é𝄞"},
        {"role": "user", "content": "no reply"},
    )
)


class Demonstrations:
    """An environment that has demonstrations and no tasks."""

    tools = ()
    native_calls = False

    def __init__(self, *demonstrations: Demonstration) -> None:
        self._demonstrations = demonstrations

    def tasks(self, split):
        return []

    def episode(self, task):
        raise NotImplementedError

    def demonstrations(self, seed):
        return self._demonstrations

    def corpus(self):
        return []


def rows_for(chat, *demonstrations: Demonstration) -> Rows:
    turns = [demonstration_turns(chat, one) for one in demonstrations]
    return rows_of(turns, [1.0] * sum(map(len, turns)))


def test_targets_are_the_tokens_of_the_assistant(chat):
    row = rows_for(chat, LONG)
    replies = [chat.encode_turn("<tool>Ulm</tool>"), chat.encode_turn("Ida")]
    assert len(row) == 1 and row.targets_N.tolist() == [*replies[0], *replies[1]]
    assert row.tokens_T[row.states_N[:-1] + 1].tolist() == row.targets_N[:-1].tolist()
    short = rows_for(chat, SHORT)
    assert chat.decode_turn(short.targets_N.tolist()) == "é𝄞" and short.targets_N[-1] == chat.end_id


def test_gradient_is_that_of_the_mean_negative_log_likelihood(policy, chat):
    rows = rows_for(chat, LONG, SHORT)
    count = len(rows.targets_N)
    gradients = []

    class RecordingOptimizer(Optimizer):
        def step(self) -> float:
            gradients.extend(p.grad.clone() for p in self.parameters)
            return super().step()

    start = {name: value.clone() for name, value in policy.model.state_dict().items()}
    optimizer = RecordingOptimizer(policy.model.parameters(), OptimConfig(lr=1e-3))
    done = update(
        Learner(policy=policy, optimizer=optimizer),
        [batch_of(rows, [1.0 / count] * 2, "cpu")],
        LossConfig(),
    )

    policy.model.load_state_dict(start)
    loss = torch.zeros(())
    for row in (rows.take([i]) for i in range(len(rows))):
        ids = [*row.tokens_T.tolist(), int(row.targets_N[-1])]
        labels = [-100] * len(ids)
        for place, target in zip(row.states_N, row.targets_N.tolist(), strict=True):
            labels[place + 1] = target
        out = policy.model(input_ids=torch.tensor([ids]), use_cache=False)
        logits = out.logits[0, :-1].float()
        loss = loss + torch.nn.functional.cross_entropy(
            logits, torch.tensor(labels[1:]), reduction="sum", ignore_index=-100
        )
    (loss / count).backward()
    assert done.logprob.value == pytest.approx(-float(loss.detach()) / count, abs=1e-5)
    largest_error = max(
        float((ours - p.grad).abs().max())
        for ours, p in zip(gradients, policy.model.parameters(), strict=True)
    )
    assert largest_error <= 1e-6
    assert max(float(g.abs().max()) for g in gradients) > 1e-2


def tune(policy, env, chat, config: SftConfig, *, seed: int = 0) -> list[float]:
    """The loss of every step."""
    rows = demonstration_rows(policy, env, chat, config, seed=seed)
    batches = sft_batches(rows, config, seed=seed, device="cpu")
    learner = Learner(policy=policy, optimizer=sft_optimizer(policy, config))
    steps = islice(batches, config.steps)
    return [-update(learner, [batch], LossConfig()).logprob.value for batch in steps]


def test_loss_falls_and_the_same_seed_gives_the_same_steps(policy, chat):
    start = {name: value.clone() for name, value in policy.model.state_dict().items()}
    config = SftConfig(steps=25, lr=1e-2, batch_tokens=64)
    runs = []
    for _ in range(2):
        policy.model.load_state_dict(start)
        runs.append(tune(policy, Demonstrations(LONG, SHORT), chat, config, seed=4))
    assert runs[0] == runs[1] and len(runs[0]) == 25
    assert sum(runs[0][-5:]) < 0.5 * sum(runs[0][:5])


def recipe(model: Path, **sections):
    tree = {
        "model": {"path": str(model)},
        "env": {"name": "letters:Letters"},
        "sampler": {"backend": "local"},
        "train": {"device": "cpu", "save_every": 3},
        "sft": {"steps": 8, "lr": 1e-2, "batch_tokens": 64},
        **sections,
    }
    return build_config(tree)


def losses(run_dir: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(run_dir)]


def test_a_resumed_run_equals_one_without_a_stop(tiny_folder, tmp_path):
    uninterrupted = tmp_path / "uninterrupted"
    assert warm_start(recipe(tiny_folder), uninterrupted) == uninterrupted / "model"
    assert [step for step, _ in losses(uninterrupted)] == list(range(1, 9))

    run_dir = tmp_path / "resumed"
    for count in (0, 4, 2):  # steps until the stop
        kept = warm_start(
            recipe(tiny_folder),
            run_dir,
            resume=run_dir.exists(),
            should_stop=stop_after(count),
        )
        assert kept.parent == run_dir / "checkpoints" and not (run_dir / "model").exists()
    assert kept.name == "step_000006"
    shutil.rmtree(kept)  # continue from the checkpoint before it
    assert warm_start(recipe(tiny_folder), run_dir, resume=True) == run_dir / "model"
    assert losses(run_dir) == losses(uninterrupted)
    files = [folder / "model" / "model.safetensors" for folder in (run_dir, uninterrupted)]
    assert files[0].read_bytes() == files[1].read_bytes()

    assert warm_start(recipe(tiny_folder), run_dir, resume=True) == run_dir / "model"
    assert losses(run_dir) == losses(uninterrupted)
    with pytest.raises(ConfigError, match="continue it with --resume"):
        warm_start(recipe(tiny_folder), run_dir)


def test_a_failed_step_leaves_a_checkpoint_of_the_steps_before(tiny_folder, tmp_path):
    diverging = {"steps": 8, "lr": 1e37, "batch_tokens": 64}
    with pytest.raises(TrainingError, match="gradient norm nan"):
        warm_start(recipe(tiny_folder, sft=diverging), tmp_path)
    (last, _) = losses(tmp_path)[-1]
    assert last % 3 and newest_complete(tmp_path / "checkpoints").name == f"step_{last:06d}"


@pytest.mark.parametrize(
    ("env", "text"),
    [
        (object(), "object has no method demonstrations"),
        (Demonstrations(), r"Demonstrations.demonstrations\(0\) is empty"),
        (Demonstrations(Demonstration(messages=())), "needs a prompt"),
        (
            Demonstrations(Demonstration(messages=({"role": "assistant", "content": "I begin"},))),
            "needs a prompt",
        ),
    ],
)
def test_environment_without_demonstrations_is_an_error(policy, chat, env, text):
    with pytest.raises(ConfigError, match=text):
        demonstration_rows(policy, env, chat, SftConfig(), seed=0)


def write_lines(path: Path, *lines: object) -> str:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return str(path)


def test_file_and_environment_give_the_same_rows(policy, chat, tmp_path):
    data = write_lines(
        tmp_path / "data.jsonl",
        *({"messages": list(shown.messages)} for shown in (LONG, SHORT)),
    )
    from_env, from_file = (
        demonstration_rows(policy, env, chat, SftConfig(data=path), seed=1)
        for env, path in ((Demonstrations(LONG, SHORT), ""), (object(), data))
    )
    assert from_env.tokens_T.tolist() == from_file.tokens_T.tolist()
    assert from_env.targets_N.tolist() == from_file.targets_N.tolist()


USER = {"role": "user", "content": "Who?"}


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("{", "not JSON"),
        ({"conversation": []}, "expected a list of messages as 'messages'"),
        ({"messages": [USER, "Ida"]}, r"the 'role' of messages\[1\] must be one of system, user"),
        ({"messages": [{"role": "human", "content": "?"}]}, r"the 'role' of messages\[0\] must be"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, r"messages\[1\] needs a"),
        (
            {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [{}]}]},
            r"messages\[1\] needs a text .* instead of 'tool_calls'",
        ),
        ({"messages": [USER]}, "a demonstration needs a prompt"),
    ],
)
def test_invalid_line_is_named(policy, chat, tmp_path, line, text):
    data = write_lines(tmp_path / "data.jsonl", {"messages": list(LONG.messages)}, "", line)
    with pytest.raises(ConfigError, match=rf"^{data}:3: {text}"):
        demonstration_rows(policy, object(), chat, SftConfig(data=data), seed=0)


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        (None, r"data\.jsonl: No such file"),
        ([""], r"sft\.data: .*data\.jsonl contains no conv"),
    ],
)
def test_file_without_conversations_is_named(policy, chat, tmp_path, lines, text):
    path = tmp_path / "data.jsonl"
    if lines is not None:
        write_lines(path, *lines)
    with pytest.raises(ConfigError, match=text):
        demonstration_rows(policy, object(), chat, SftConfig(data=str(path)), seed=0)


def test_demonstration_that_is_too_long_is_an_error(policy, chat):
    env, length = Demonstrations(SHORT, LONG), len(rows_for(chat, LONG).tokens_T)
    with pytest.raises(ConfigError) as caught:
        demonstration_rows(policy, env, chat, SftConfig(batch_tokens=length - 1), seed=0)
    assert str(caught.value).startswith(
        f"sft.batch_tokens: {length - 1} is less than the {length} tokens of "
        "Demonstrations.demonstrations(0)[1]; "
    )
    config = SftConfig(steps=3, batch_tokens=length)
    assert len(tune(policy, env, chat, config)) == 3

    positions = policy.model.config.max_position_embeddings
    long = Demonstration(messages=(USER, {"role": "assistant", "content": "Ida " * positions}))
    length = len(rows_for(chat, long).tokens_T)
    text = rf"has {length} tokens, but .* max_position_embeddings = {positions}"
    with pytest.raises(ConfigError, match=text):
        demonstration_rows(policy, Demonstrations(long), chat, SftConfig(), seed=0)


def test_default_learning_rate_suits_a_pretrained_model():
    """The rate of the demo would destroy a pretrained model in a few steps."""
    assert SftConfig().lr <= 2e-5 < load_config("demo").sft.lr
