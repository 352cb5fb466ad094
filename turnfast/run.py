"""The parts of a training run, opened in order: environment, model, optimizer, sampler."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from .chat.open import open_chat
from .config.schema import VALUE_RULES, Config
from .doctor.checks import check_training, corpus_of
from .envs import Env
from .envs.base import tool_schemas
from .errors import ConfigError
from .model import Policy, default_tolerance, load_policy, pick_device
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
from .update.learner import Learner
from .update.optimizer import Optimizer
from .update.reference import open_reference


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A training run in progress.

    Attributes:
        setup: environment, chat interface and sampler.
        reference: the policy of the KL term, None without one.
        probe, tolerance: for the comparison of log-probs after a weight sync.
        first_step: the first step that is not done.
        evaluated: the evaluation after step `first_step - 1` is done, or not due.
    """

    config: Config
    directory: RunDir
    learner: Learner
    setup: RolloutSetup
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
    """Start a run, or with `resume` continue from its newest complete checkpoint.

    The recipe is checked before the run directory is created. Rank 0 writes the directory.

    Raises:
        ConfigError: names the field and the fix.
    """
    env = check_training(config, num_ranks=ranks.size)
    with ExitStack() as stack:
        with ranks.share_errors():
            directory = RunDir(path=run_dir, writes=ranks.is_leader)
            if ranks.is_leader:
                directory = stack.enter_context(RunDir.create(run_dir, config, resume=resume))
                open_model_folder(config, env, run_dir)
        with ranks.share_errors():
            policy = open_policy(config, env, run_dir)
        # initialise NCCL before vLLM sets NCCL_SOCKET_IFNAME
        ranks.all_reduce([torch.zeros(1, device=policy.device)])
        with ranks.share_errors():
            learner = open_learner(config, policy, ranks)
            reference = open_reference(config.loss, config.model, policy)
            done, state = restore(directory, learner) if resume else (0, {})
            prompts = open_queue(
                env.tasks("train"),
                config.train.seed,
                state,
                done=done * config.rollout.prompts_per_step,
                ranks=ranks,
            )
            setup = open_rollouts(config, policy, env, overlap=config.train.overlap)
            stack.callback(setup.sampler.close)
        ranks.check_equal_weights(policy.model.parameters())
        yield Run(
            config=config,
            directory=directory,
            learner=learner,
            setup=setup,
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
    """Return the folder of the recipe's model; see `model_folder`."""
    return model_folder(
        config.model.path,
        run_dir,
        corpus_of(env),
        seed=config.train.seed,
        max_context=config.rollout.max_context,
        token_cut=getattr(env, "token_cut", None),
    )


def open_policy(config: Config, env: Env, run_dir: Path) -> Policy:
    """Load the recipe's model with its adapter, if it has one."""
    device = pick_device(config.train.device)
    policy = load_policy(config.model, open_model_folder(config, env, run_dir), device)
    add_adapter(policy.model, config.model.lora, seed=config.train.seed)
    return policy


def open_learner(config: Config, policy: Policy, ranks: Ranks) -> Learner:
    """Make the optimizer of a policy, and the critic that some credit rules need."""
    optimizer = Optimizer(policy.model.parameters(), config.optim, ranks=ranks)
    critic = None
    if config.credit.rule in VALUE_RULES:
        critic = Critic(policy, config.critic, config.optim, ranks=ranks)
    return Learner(policy=policy, optimizer=optimizer, critic=critic)


def open_rollouts(
    config: Config, policy: Policy, env: Env, *, overlap: bool = False
) -> RolloutSetup:
    """Open the chat interface and the sampler of a policy; the caller closes the sampler."""
    chat = open_chat(config.model, policy.tokenizer, tool_schemas(env))
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


def training_state(learner: Learner) -> TrainingState:
    """What a checkpoint of a learner holds."""
    return TrainingState(
        model=learner.policy.model,
        optimizer=learner.optimizer,
        tokenizer=learner.policy.tokenizer,
        critic=learner.critic,
    )


def is_due(step: int, every: int, last: int) -> bool:
    """Whether something that is done every `every` steps and after the last is due after `step`."""
    return step == last or (every > 0 and step % every == 0)


def _is_evaluated(directory: RunDir, step: int, config: Config) -> bool:
    """Whether the evaluation after a step is not due, or done and logged."""
    if step and not is_due(step, config.train.eval_every, config.train.steps):
        return True
    lines = read_metrics(directory.metrics) if directory.metrics.exists() else []
    return any(name.startswith("eval/") for line in lines if line["step"] == step for name in line)


def restore(
    directory: RunDir, learner: Learner, *, kind: Literal["train", "sft"] = "train"
) -> tuple[int, Mapping[str, Any]]:
    """Load the newest complete checkpoint and drop the log lines of later steps.

    Returns:
        The step of the checkpoint, 0 without one, and the state that was saved with it.
    Raises:
        ConfigError: the checkpoint is of the other command.
        CheckpointError: it does not fit the model, the optimizer or the critic.
    """
    newest = newest_complete(directory.checkpoints)
    if newest is None:
        directory.rewind(-1)
        return 0, {}
    state = load_checkpoint(newest, training_state(learner))
    saved_kind = state.get("kind", kind)
    if saved_kind != kind:
        raise ConfigError(
            f"{directory.path}: holds a run of `turnfast {saved_kind}`; choose another --run-dir. "
            f"To start from its weights, set --model.path {newest}"
        )
    step = int(state["step"])
    directory.rewind(step)
    return step, state
