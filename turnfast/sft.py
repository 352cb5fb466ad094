"""Warm start: supervised tuning on demonstrations, the environment's own or those of a file.

A demonstration becomes the same rows as a rollout, with the scripted replies in the place of the
sampled ones, an advantage of 1 on every turn and no old policy: the gradient of the policy loss is
then that of the mean negative log-likelihood, so packing and loss head are the trainer's own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
from jinja2 import TemplateError

from .chat.base import ChatInterface
from .config.schema import Config, LossConfig, OptimConfig, SftConfig
from .envs import Demonstration, Env
from .envs.demonstrations import demonstrations_of
from .envs.load import open_env
from .errors import ConfigError, OutOfMemory, TrainingError
from .model import Policy, load_policy, pick_device
from .model.lora import add_adapter
from .packing.pack import batch_of
from .packing.rows import rows_of
from .report.console import Progress
from .run import is_due, open_env_chat, open_model_folder, restore
from .rundir.checkpoint import TrainingState, save_checkpoint, save_model
from .rundir.directory import RunDir
from .types import Turn
from .update.learner import Learner
from .update.memory import smaller_microbatches
from .update.optimizer import Optimizer
from .update.update import Update, update

FAULTS = (OutOfMemory, TrainingError)
"""What can fail in a step and leaves the weights whole."""


def warm_start(
    config: Config,
    run_dir: Path,
    *,
    resume: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> Path:
    """Tune the recipe's model on its environment's demonstrations, or those of `sft.data`.

    A checkpoint is left every `train.save_every` steps and when it ends or is stopped; with
    `resume` the tuning goes on from the newest whole one, as if it had never stopped.

    Returns:
        `run_dir/model`, a Hugging Face folder for `--model.path`; after a stop its last checkpoint.
    Raises:
        OutOfMemory, TrainingError: after a checkpoint of the steps that were done.
        ConfigError, CheckpointError: see their rooms; without one.
    """
    env = open_env(config)
    with RunDir.create(run_dir, config, resume=resume) as directory:
        policy = load_policy(
            config.model, open_model_folder(config, env, run_dir), pick_device(config.train.device)
        )
        add_adapter(policy.model, config.model.lora, seed=config.train.seed)
        optimizer = sft_optimizer(policy, config.sft)
        begun = done = restore(directory, policy, optimizer, kind="sft")[0] if resume else 0
        save = partial(
            save_checkpoint,
            directory.checkpoints,
            training=TrainingState(
                model=policy.model, optimizer=optimizer, tokenizer=policy.tokenizer
            ),
            progress={"kind": "sft"},  # the order of the data is a function of the seed
            keep=config.train.keep_checkpoints,
        )
        with Progress(run_dir, config.sft.steps, done=done, label="warm start") as progress:

            def report(step: int, update: Update) -> None:
                nonlocal done
                done = step
                figures = {
                    "loss": -update.logprob.value,
                    "entropy": update.entropy.value,
                    "grad_norm": update.grad_norm,
                }
                directory.log(step, figures)
                progress.step(step, figures)
                if is_due(step, config.train.save_every, config.sft.steps):
                    save(step)

            try:
                sft(
                    policy,
                    env,
                    open_env_chat(config.model, policy, env),
                    config.sft,
                    seed=config.train.seed,
                    optimizer=optimizer,
                    done=done,
                    report=report,
                    should_stop=should_stop,
                )
            except FAULTS:
                if done > begun:
                    save(done)
                raise
            kept = save(done)
        if done < config.sft.steps:
            return kept
        folder = run_dir / "model"
        save_model(policy.model, folder)
        policy.tokenizer.save_pretrained(folder)
    return folder


def sft(
    policy: Policy,
    env: Env,
    chat: ChatInterface,
    config: SftConfig,
    *,
    seed: int,
    optimizer: Optimizer | None = None,
    done: int = 0,
    report: Callable[[int, Update], None] = lambda step, done: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Tune the policy in place, until `config.steps` are done or it is asked to stop.

    Args:
        optimizer: that of an earlier leg (see `sft_optimizer`), with `done` steps behind it.
        report: called after every step with its number and figures.
    Raises:
        ConfigError: there are no demonstrations, or one is too long.
        TrainingError: the loss or its gradient is not finite.
    """
    places: list[str] = []
    shown: list[list[Turn]] = []
    for where, demonstration in demonstrations_of(env, config.data, seed):
        try:
            shown.append(demonstration_turns(chat, demonstration))
        except (ConfigError, TemplateError) as error:
            raise ConfigError(f"{where}: {error}") from None
        places.append(where)
    rows = rows_of(shown, [1.0] * sum(map(len, shown)))
    lengths = rows.lengths_S.tolist()
    for length, number in zip(lengths, rows.trajectories_S.tolist(), strict=True):
        _refuse_long(length, places[number], policy, config)
    optimizer = optimizer or sft_optimizer(policy, config)
    parts = _parts(lengths, config.batch_tokens, seed)
    learner = Learner(policy=policy, optimizer=optimizer)
    advice = smaller_microbatches(
        "sft.batch_tokens",
        config.batch_tokens,
        least=max(lengths),
        checkpointing=policy.model.is_gradient_checkpointing,
    )
    for step, part in enumerate(islice(parts, done, config.steps), start=done + 1):
        if should_stop():
            return
        taken = rows.take(part)
        weights = np.full(len(shown), 1.0 / len(taken.targets_N))
        batch = batch_of(taken, weights, policy.device)
        report(step, update(learner, [batch], LossConfig(), memory_advice=advice))


def sft_optimizer(policy: Policy, config: SftConfig) -> Optimizer:
    """AdamW with a short warm-up and a linear decay over `config.steps`."""
    optim = OptimConfig(lr=config.lr, betas=(0.9, 0.95), warmup_steps=20, grad_clip=1.0)
    return Optimizer(policy.model.parameters(), optim, total_steps=config.steps)


def demonstration_turns(chat: ChatInterface, shown: Demonstration) -> list[Turn]:
    """One demonstration as if the assistant's messages, and their ends, were sampled."""
    messages = shown.messages
    said = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not said or said[0] == 0:
        raise ConfigError("a demonstration needs a prompt and at least one assistant message")
    talk = chat.open(messages[: said[0]])
    turns: list[Turn] = []
    for here, after in pairwise((*said, len(messages))):
        text = str(messages[here]["content"])
        ids = chat.encode_turn(text)
        turns.append(
            Turn(
                prompt_ids=talk.prompt_ids,
                sampled_ids=ids,
                logprobs=(0.0,) * len(ids),
                text=text,
                finish="stop",
                restart=talk.restart,
            )
        )
        if after < len(messages):
            talk = chat.extend(talk, text, True, messages[here + 1 : after])
    return turns


def _refuse_long(length: int, where: str, policy: Policy, config: SftConfig) -> None:
    text = policy.model.config.get_text_config()
    most = getattr(text, "max_position_embeddings", None)
    if most is not None and length > most:
        raise ConfigError(
            f"{where}: a row of {length} tokens, but {text.model_type} has "
            f"max_position_embeddings = {most}; shorten it or leave it out"
        )
    if length > config.batch_tokens:
        raise ConfigError(
            f"sft.batch_tokens: {config.batch_tokens} cannot hold the {length} tokens of {where}; "
            "raise it (memory grows with it), or leave that one out"
        )


def _parts(lengths: Sequence[int], budget: int, seed: int) -> Iterator[list[int]]:
    """Endless shuffled passes over rows of these lengths, cut whenever the budget is full."""
    order = random.Random(seed)
    taken: list[int] = []
    size = 0
    while True:
        for row in order.sample(range(len(lengths)), len(lengths)):
            if taken and size + lengths[row] > budget:
                yield taken
                taken, size = [], 0
            taken.append(row)
            size += lengths[row]
