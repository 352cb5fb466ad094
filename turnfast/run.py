"""What a run holds open, put together from a recipe: model, environment, engine, optimizer."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from .chat.base import ChatInterface
from .chat.open import open_chat
from .config.schema import VALUE_RULES, Config, ModelConfig
from .credit import check_rule
from .doctor.checks import refuse_rounded_adapter, refuse_uneven
from .envs import Demonstrator, Env, tasks_of
from .envs.load import open_env
from .errors import ConfigError
from .model import (
    Policy,
    default_tolerance,
    load_policy,
    pick_device,
)
from .model.folder import model_folder
from .model.lora import add_adapter
from .parallel.ranks import ALONE, Ranks
from .rollout.prompts import PromptQueue, open_queue
from .rollout.setup import RolloutSetup
from .rundir.checkpoint import TrainingState, load_checkpoint, newest_complete
from .rundir.directory import RunDir, read_metrics
from .sampler.open import open_sampler
from .sampler.sync import Probe, make_probe
from .update.critic import Critic
from .update.optimizer import Optimizer
from .update.reference import open_reference
from .update.update import check_impl

GARBAGE_THRESHOLD = 20_000
"""Objects made and not freed before young ones are searched for cycles; Python's own is 700."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A training run in progress; the steps before `first_step` are done, and so is the evaluation
    that was due after them if `evaluated` says so."""

    config: Config
    directory: RunDir
    policy: Policy
    setup: RolloutSetup
    optimizer: Optimizer
    critic: Critic | None
    reference: Policy | None
    probe: Probe
    tolerance: float
    prompts: PromptQueue
    first_step: int
    evaluated: bool
    ranks: Ranks


@contextmanager
def open_run(
    config: Config, run_dir: Path, *, resume: bool = False, ranks: Ranks = ALONE
) -> Iterator[Run]:
    """Start a run, or go on from the newest whole checkpoint of an earlier one.

    Everything that can be wrong with the recipe is found before the run directory is made. Where
    there are several ranks the first one makes and writes it.

    Raises:
        ConfigError: the text names the field and the way out.
    """
    check_rule(config.credit.rule, config.credit.options, num_ranks=ranks.size)
    refuse_uneven(config.rollout, ranks)
    env = open_env(config)
    train_tasks = tasks_of(env, "train", name=config.env.name)
    device = pick_device(config.train.device)
    refuse_rounded_adapter(config, device)
    with ExitStack() as opened:
        with ranks.share_errors():
            directory = RunDir(path=run_dir, writes=ranks.is_leader)
            if ranks.is_leader:
                directory = opened.enter_context(RunDir.create(run_dir, config, resume=resume))
                open_model_folder(config, env, run_dir)
        with ranks.share_errors():
            policy = load_policy(config.model, open_model_folder(config, env, run_dir), device)
            add_adapter(policy.model, config.model.lora, seed=config.train.seed)
            check_impl(config.loss, device, policy.model.dtype)
        # the first word between GPUs, before the engine says which network they have
        ranks.all_reduce([torch.zeros(1, device=device)])
        with ranks.share_errors():
            optimizer = Optimizer(policy.model.parameters(), config.optim, ranks=ranks)
            critic = None
            if config.credit.rule in VALUE_RULES:
                critic = Critic(policy, config.critic, config.optim, ranks=ranks)
            reference = open_reference(config.loss, config.model, policy)
            done, state = 0, {}
            if resume:
                done, state = restore(directory, policy, optimizer, critic)
            prompts = open_queue(
                train_tasks,
                config.train.seed,
                state,
                done=done * config.rollout.prompts_per_step,
                ranks=ranks,
            )
            setup = open_rollouts(config, policy, env, overlap=config.train.overlap)
            opened.callback(setup.sampler.close)
        ranks.check_equal_weights(policy.model.parameters())
        # what is there now stays: to walk all of torch for garbage takes a quarter of a second
        gc.freeze()
        opened.callback(gc.unfreeze)
        # and what a step makes is nearly all freed without its help: let it look less often
        opened.callback(gc.set_threshold, *gc.get_threshold())
        gc.set_threshold(GARBAGE_THRESHOLD, 10, 10)
        yield Run(
            config=config,
            directory=directory,
            policy=policy,
            setup=setup,
            optimizer=optimizer,
            critic=critic,
            reference=reference,
            probe=make_probe(policy.model.config.vocab_size, config.rollout.max_context),
            tolerance=config.sampler.probe_tolerance
            or default_tolerance(policy.model.dtype, policy.device.type),
            prompts=prompts,
            first_step=done + 1,
            evaluated=ranks.all_gather(_is_evaluated(directory, done, config))[0],
            ranks=ranks,
        )


def open_model_folder(config: Config, env: Env, run_dir: Path) -> Path:
    """The recipe's model; the tiny one learns its tokenizer from the environment's corpus."""
    corpus = env.corpus if isinstance(env, Demonstrator) else None
    return model_folder(config, run_dir, corpus, token_cut=getattr(env, "token_cut", None))


def open_env_chat(config: ModelConfig, policy: Policy, env: Env) -> ChatInterface:
    """The chat interface of a policy, with the tools of its environment."""
    schemas = [tool.schema for tool in env.tools] if env.native_calls else []
    return open_chat(config, policy.tokenizer, schemas)


def open_rollouts(
    config: Config, policy: Policy, env: Env, *, overlap: bool = False
) -> RolloutSetup:
    """Open the chat interface and the sampler of a policy; the caller closes the sampler."""
    chat = open_env_chat(config.model, policy, env)
    sampler = open_sampler(
        config.sampler,
        policy,
        chat.stop_ids,
        max_context=config.rollout.max_context,
        seed=config.train.seed,
        overlap=overlap,
    )
    return RolloutSetup(
        env=env,
        chat=chat,
        sampler=sampler,
        config=config.rollout,
        max_turns=config.env.max_turns,
        seed=config.train.seed,
    )


def is_due(step: int, every: int, last: int) -> bool:
    """Whether something done every so many steps, and after the last one, is done after this."""
    return step == last or (every > 0 and step % every == 0)


def _is_evaluated(directory: RunDir, step: int, config: Config) -> bool:
    """False also for an evaluation that a stop or a failure cut short."""
    if step and not is_due(step, config.train.eval_every, config.train.steps):
        return True
    lines = read_metrics(directory.metrics) if directory.metrics.exists() else []
    names = [name for line in lines if line["step"] == step for name in line]
    return any(name.startswith("eval/") for name in names)


def restore(
    directory: RunDir,
    policy: Policy,
    optimizer: Optimizer,
    critic: Critic | None = None,
    *,
    kind: Literal["train", "sft"] = "train",
) -> tuple[int, Mapping[str, Any]]:
    """Put the newest whole checkpoint in place; the step that the run goes on after, 0 without a
    checkpoint, and the state that was saved with it.

    Raises:
        ConfigError: the checkpoint is of the other kind of run.
        CheckpointError: it does not fit the model, the optimizer or the critic.
    """
    newest = newest_complete(directory.checkpoints)
    if newest is None:
        directory.rewind(-1)
        return 0, {}
    training = TrainingState(model=policy.model, optimizer=optimizer, critic=critic)
    state = load_checkpoint(newest, training)
    found = state.get("kind", kind)
    if found != kind:
        raise ConfigError(
            f"{directory.path}: holds a run of `turnfast {found}`; give another --run-dir, and to "
            f"go on from its weights --model.path {newest}"
        )
    step = int(state["step"])
    directory.rewind(step)
    return step, state
