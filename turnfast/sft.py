"""Supervised fine-tuning on demonstrations, from the environment or a file.

A demonstration becomes the same rows as a rollout: its assistant messages take the place of the
sampled ones, with an advantage of 1 for every turn and no old policy. The gradient of the policy
loss is then that of the mean negative log-likelihood.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError

from .chat.base import ChatInterface
from .chat.open import open_chat
from .config.schema import Config, LossConfig, OptimConfig, SftConfig
from .doctor.checks import check_model
from .envs import Demonstration, Env
from .envs.base import tool_schemas
from .envs.demonstrations import demonstrations_of
from .envs.load import open_env
from .errors import ConfigError, OutOfMemory, TrainingError
from .model import Policy
from .packing.pack import batch_of
from .packing.rows import Rows, rows_of
from .report.console import Progress
from .run import is_due, open_policy, restore, training_state
from .rundir.checkpoint import save_checkpoint, save_model
from .rundir.directory import RunDir
from .types import Batch, Turn
from .update.learner import Learner
from .update.memory import smaller_microbatches
from .update.optimizer import Optimizer
from .update.update import update

FAULTS = (OutOfMemory, TrainingError)
"""Errors of a step that leave the weights as they were before it."""


def warm_start(
    config: Config,
    run_dir: Path,
    *,
    resume: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> Path:
    """Fine-tune the recipe's model on demonstrations.

    A checkpoint is saved every `train.save_every` steps, at the end, and when `should_stop` returns
    True. With `resume` the run continues from the newest one; the result is the same as without a
    stop.

    Returns:
        `run_dir/model`, a Hugging Face folder for `model.path`; after a stop the last checkpoint.
    Raises:
        OutOfMemory, TrainingError: after a checkpoint of the completed steps.
        ConfigError, CheckpointError: without a checkpoint.
    """
    env = open_env(config.env)
    check_model(config, env)
    with RunDir.create(run_dir, config, resume=resume) as directory:
        policy = open_policy(config, env, run_dir)
        chat = open_chat(config.model, policy.tokenizer, tool_schemas(env))
        learner = Learner(policy=policy, optimizer=sft_optimizer(policy, config.sft))
        first = done = restore(directory, learner, kind="sft")[0] if resume else 0
        save = partial(
            save_checkpoint,
            directory.checkpoints,
            training=training_state(learner),
            progress={"kind": "sft"},  # the order of the data depends on the seed alone
            keep=config.train.keep_checkpoints,
        )
        rows = demonstration_rows(policy, env, chat, config.sft, seed=config.train.seed)
        batches = sft_batches(rows, config.sft, seed=config.train.seed, device=policy.device)
        advice = _memory_advice(config, rows)
        with Progress(run_dir, config.sft.steps, done=done, label="sft") as progress:
            try:
                for batch in islice(batches, first, config.sft.steps):
                    if should_stop():
                        break
                    updated = update(learner, [batch], LossConfig(), memory_advice=advice)
                    done += 1
                    metrics = {
                        "loss": -updated.logprob.value,
                        "entropy": updated.entropy.value,
                        "grad_norm": updated.grad_norm,
                    }
                    directory.log(done, metrics)
                    progress.step(done, metrics)
                    if is_due(done, config.train.save_every, config.sft.steps):
                        save(done)
            except FAULTS:
                if done > first:
                    save(done)
                raise
            checkpoint = save(done)
        if done < config.sft.steps:
            return checkpoint
        return _write_model(policy, run_dir / "model")


def sft_optimizer(policy: Policy, config: SftConfig) -> Optimizer:
    """AdamW with a short warm-up and a linear decay over `config.steps`."""
    optim = OptimConfig(lr=config.lr, betas=(0.9, 0.95), warmup_steps=20, grad_clip=1.0)
    return Optimizer(policy.model.parameters(), optim, total_steps=config.steps)


def demonstration_rows(
    policy: Policy, env: Env, chat: ChatInterface, config: SftConfig, *, seed: int
) -> Rows:
    """Tokenize the demonstrations of `sft.data`, or of the environment.

    Raises:
        ConfigError: there are none, one cannot be tokenized, or one is too long.
    """
    names: list[str] = []
    turns: list[list[Turn]] = []
    for name, demonstration in demonstrations_of(env, config.data, seed):
        try:
            turns.append(demonstration_turns(chat, demonstration))
        except (ConfigError, TemplateError) as error:
            raise ConfigError(f"{name}: {error}") from None
        names.append(name)
    rows = rows_of(turns, [1.0] * sum(map(len, turns)))
    for length, trajectory in zip(rows.lengths_S.tolist(), rows.trajectories_S, strict=True):
        _check_length(length, names[trajectory], policy, config)
    return rows


def sft_batches(rows: Rows, config: SftConfig, *, seed: int, device: Any) -> Iterator[Batch]:
    """Yield one batch of at most `config.batch_tokens` tokens per optimizer step, without end."""
    num_trajectories = int(rows.trajectories_S.max()) + 1
    for part in _parts(rows.lengths_S.tolist(), config.batch_tokens, seed):
        part_rows = rows.take(part)
        weights = np.full(num_trajectories, 1.0 / len(part_rows.targets_N))
        yield batch_of(part_rows, weights, device)


def demonstration_turns(chat: ChatInterface, demonstration: Demonstration) -> list[Turn]:
    """Convert a demonstration to turns, as if its assistant messages had been sampled."""
    messages = demonstration.messages
    replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not replies or replies[0] == 0:
        raise ConfigError("a demonstration needs a prompt and at least one assistant message")
    conversation = chat.open(messages[: replies[0]])
    turns: list[Turn] = []
    for reply, next_reply in pairwise((*replies, len(messages))):
        text = str(messages[reply]["content"])
        ids = chat.encode_turn(text)
        turns.append(
            Turn(
                prompt_ids=conversation.prompt_ids,
                sampled_ids=ids,
                logprobs=(0.0,) * len(ids),
                text=text,
                finish="stop",
                restart=conversation.restart,
            )
        )
        if next_reply < len(messages):
            conversation = chat.extend(conversation, text, True, messages[reply + 1 : next_reply])
    return turns


def _memory_advice(config: Config, rows: Rows) -> str:
    return smaller_microbatches(
        "sft.batch_tokens",
        config.sft.batch_tokens,
        least=int(rows.lengths_S.max()),
        checkpointing=config.model.checkpointing,
    )


def _write_model(policy: Policy, folder: Path) -> Path:
    """Write model and tokenizer; the folder exists only when it is complete."""
    incomplete = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(incomplete, ignore_errors=True)
    save_model(policy.model, incomplete)
    policy.tokenizer.save_pretrained(incomplete)
    shutil.rmtree(folder, ignore_errors=True)
    return incomplete.rename(folder)


def _check_length(length: int, name: str, policy: Policy, config: SftConfig) -> None:
    text = policy.model.config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise ConfigError(
            f"{name}: has {length} tokens, but {text.model_type} has max_position_embeddings = "
            f"{positions}; shorten it or remove it"
        )
    if length > config.batch_tokens:
        raise ConfigError(
            f"sft.batch_tokens: {config.batch_tokens} is less than the {length} tokens of {name}; "
            "raise it, or remove that demonstration"
        )


def _parts(lengths: Sequence[int], budget: int, seed: int) -> Iterator[list[int]]:
    """Endless shuffled passes over rows, cut into parts of at most `budget` tokens."""
    order = random.Random(seed)
    part: list[int] = []
    size = 0
    while True:
        for row in order.sample(range(len(lengths)), len(lengths)):
            if part and size + lengths[row] > budget:
                yield part
                part, size = [], 0
            part.append(row)
            size += lengths[row]
