"""Warm start: supervised tuning on demonstrations, the environment's own or those of a file.

A demonstration becomes the same rows as a rollout, with the scripted replies in the place of the
sampled ones, an advantage of 1 on every turn and no old policy: the gradient of the policy loss is
then that of the mean negative log-likelihood, so packing and loss head are the trainer's own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, pairwise

from jinja2 import TemplateError

from .chat import Bridge, ChatError
from .config import ConfigError, LossConfig, OptimConfig, SftConfig
from .demonstrations import demonstrations_of
from .envs import Demonstration, Env
from .loss import Update, update
from .model import Policy
from .optim import Optimizer
from .packing import batch_of
from .replay import Budget
from .rows import Row, rows_of
from .types import Turn


def sft(
    policy: Policy,
    env: Env,
    chat: Bridge,
    config: SftConfig,
    *,
    seed: int,
    optimizer: Optimizer | None = None,
    done: int = 0,
    report: Callable[[int, Update], None] = lambda step, done: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> int:
    """Tune the policy in place.

    Args:
        optimizer: that of an earlier leg (see `sft_optimizer`), with `done` steps behind it.
        report: called after every step with its number and figures.
    Returns:
        The number of steps that are done, fewer than `config.steps` after a stop.
    Raises:
        ConfigError: there are no demonstrations, or one is too long.
        TrainingError: the loss or its gradient is not finite.
    """
    rows: list[Row] = []
    for where, shown in demonstrations_of(env, config.data, seed):
        try:
            found = demonstration_rows(chat, shown)
        except (ConfigError, ChatError, TemplateError) as error:
            raise ConfigError(f"{where}: {error}") from None
        _refuse_long(max(len(row.tokens) for row in found), where, policy, config)
        rows += found
    optimizer = optimizer or sft_optimizer(policy, config)
    parts = _parts(rows, config.batch_tokens, seed)
    budget = Budget()
    for step, part in enumerate(islice(parts, done, config.steps), start=done + 1):
        if should_stop():
            return step - 1
        weight = 1.0 / sum(len(row.targets) for row in part)
        batch = batch_of(part, [weight], policy.device)
        budget.begin_step()
        report(step, update(policy, optimizer, [batch], LossConfig(), budget=budget))
    return max(done, config.steps)


def sft_optimizer(policy: Policy, config: SftConfig) -> Optimizer:
    """AdamW with a short warm-up and a linear decay over `config.steps`."""
    optim = OptimConfig(lr=config.lr, betas=(0.9, 0.95), warmup_steps=20, grad_clip=1.0)
    return Optimizer(policy.model.parameters(), optim, total_steps=config.steps)


def demonstration_rows(chat: Bridge, shown: Demonstration) -> list[Row]:
    """The rows of one demonstration; targets are the assistant's messages and their ends."""
    messages = shown.messages
    said = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not said or said[0] == 0:
        raise ConfigError("a demonstration needs a prompt and at least one assistant message")
    talk = chat.open(messages[: said[0]])
    turns: list[Turn] = []
    for here, after in pairwise((*said, len(messages))):
        text = str(messages[here]["content"])
        ids = chat.encode_reply(text)
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
    return rows_of(turns, [1.0] * len(turns), 0)


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


def _parts(rows: Sequence[Row], budget: int, seed: int) -> Iterator[list[Row]]:
    """Endless shuffled passes over the rows, cut whenever the budget is full."""
    order = random.Random(seed)
    taken: list[Row] = []
    size = 0
    while True:
        for row in order.sample(rows, len(rows)):
            if taken and size + len(row.tokens) > budget:
                yield taken
                taken, size = [], 0
            taken.append(row)
            size += len(row.tokens)
