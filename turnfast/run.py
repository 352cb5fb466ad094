"""What a run holds open, put together from a recipe: model, environment, engine, optimizer."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import torch

from .chat.renderers import RenderedChat
from .chat.template import Bridge, Chat, ChatError
from .config.schema import VALUE_RULES, Config, ConfigError, ModelConfig, RolloutConfig
from .credit import check_rule
from .envs import Demonstrator, Env, load_env, tasks_of
from .model import (
    Policy,
    default_tolerance,
    dtype_of,
    load_policy,
    pick_device,
    refuse_long_context,
)
from .model.lora import add_adapter
from .model.tiny import write_tiny_model
from .parallel.ranks import ALONE, Ranks
from .rollout.prompts import PromptQueue, open_queue
from .rundir.checkpoint import load_checkpoint, newest_whole
from .rundir.directory import RunDir, read_metrics
from .sampler import Sampler, choose_backend, make_sampler
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
    env: Env
    chat: Bridge
    sampler: Sampler
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
    _refuse_uneven(config.rollout, ranks)
    env = open_env(config)
    train_tasks = tasks_of(env, "train", name=config.env.name)
    device = pick_device(config.train.device)
    refuse_rounded_adapter(config, device)
    with ExitStack() as opened:
        with ranks.together():
            directory = RunDir(path=run_dir, writes=ranks.leads)
            if ranks.leads:
                directory = opened.enter_context(RunDir.create(run_dir, config, resume=resume))
                model_folder(config, env, run_dir)
        with ranks.together():
            policy = load_policy(config.model, model_folder(config, env, run_dir), device)
            add_adapter(policy.model, config.model.lora, seed=config.train.seed)
            check_impl(config.loss, device, policy.model.dtype)
        # the first word between GPUs, before the engine says which network they have
        ranks.add_up([torch.zeros(1, device=device)])
        with ranks.together():
            chat = open_chat(config.model, policy, env)
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
            sampler = open_sampler(config, policy, chat, beside_training=config.train.overlap)
            opened.callback(sampler.close)
        ranks.refuse_difference(policy.model.parameters())
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
            env=env,
            chat=chat,
            sampler=sampler,
            optimizer=optimizer,
            critic=critic,
            reference=reference,
            probe=make_probe(policy.model.config.vocab_size, config.rollout.max_context),
            tolerance=config.sampler.probe_tolerance
            or default_tolerance(policy.model.dtype, policy.device.type),
            prompts=prompts,
            first_step=done + 1,
            evaluated=ranks.gather(_is_evaluated(directory, done, config))[0],
            ranks=ranks,
        )


def _refuse_uneven(config: RolloutConfig, ranks: Ranks) -> None:
    if config.prompts_per_step % ranks.size:
        raise ConfigError(
            f"rollout.prompts_per_step: {config.prompts_per_step} prompts cannot be dealt evenly "
            f"to {ranks.size} ranks; set it to a multiple of {ranks.size}"
        )


def refuse_rounded_adapter(config: Config, device: torch.device) -> None:
    """Refuse an adapter that the sampler knows in part only, with nothing to make up for it.

    A sampler with weights of its own is given W + B A rounded to the model's dtype: where B A is
    below half the last digit of W it samples from W, and the ratio of the trainer's policy to that
    would be taken for 1.

    Raises:
        ConfigError: a low-precision dtype, such a sampler, and no importance weight.
    """
    dtype = dtype_of(config.model, device)
    weighed = config.loss.is_cap is not None or config.loss.old_logprobs == "sampler"
    if not config.model.lora.r or dtype == torch.float32 or weighed:
        return
    if choose_backend(config.sampler) == "local":
        return  # it samples with the trainer's own module, adapter and all
    raise ConfigError(
        f"loss.is_cap: vLLM is given the adapter merged into {str(dtype).removeprefix('torch.')} "
        "weights, which rounds its smallest changes away, and samples from a slightly different "
        "policy; set loss.is_cap (such as 2.0) or loss.old_logprobs = 'sampler', which weigh that, "
        "or model.dtype = 'float32'"
    )


def open_env(config: Config) -> Env:
    return load_env(
        config.env.name,
        config.env.options,
        rewards=config.env.rewards,
        max_turns=config.env.max_turns,
        tool_timeout_s=config.env.tool_timeout_s,
    )


def model_folder(config: Config, env: Env, run_dir: Path) -> Path:
    """Where the weights are; the built-in model is made in the run directory first."""
    if config.model.path != "tiny":
        return checked_folder(config.model.path)
    if not isinstance(env, Demonstrator):
        raise ConfigError(
            "model.path: 'tiny' learns its tokenizer from the environment's corpus(), which "
            f"{type(env).__name__} does not have; name a model"
        )
    folder = run_dir / "tiny"
    if not (folder / "config.json").exists():
        write_tiny_model(
            folder,
            env.corpus(),
            seed=config.train.seed,
            cut=getattr(env, "token_cut", None),
            max_context=config.rollout.max_context,
        )
    return folder


def checked_folder(path: str) -> Path:
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    # a hub name is `owner/name`, or `name` for a few old ones
    if folder.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1:
        raise ConfigError(f"model.path: there is no folder {path}")
    return folder


def open_chat(config: ModelConfig, policy: Policy, env: Env) -> Bridge:
    schemas = [tool.schema for tool in env.tools] if env.native_calls else []
    return bridge_of(config, policy.tokenizer, policy.folder, schemas)


def bridge_of(config: ModelConfig, tokenizer: Any, folder: Path, schemas: list[Any]) -> Bridge:
    """Messages and ids of a tokenizer from `folder`, for a model that is told of these tools."""
    try:
        if config.renderer == "template":
            _refuse_unread(config.template_options, tokenizer)
            return Chat(tokenizer, schemas, config.template_options)
        return RenderedChat(tokenizer, config.renderer, schemas)
    except ChatError as error:
        raise ConfigError(f"model.path: {folder}: {error}") from None


def _refuse_unread(options: Mapping[str, Any], tokenizer: Any) -> None:
    """Refuse an option of the template that it never reads, or that is the tokenizer's own."""
    taken = {"messages", *signature(tokenizer.apply_chat_template).parameters}
    for name in options:
        template = str(tokenizer.chat_template or name)  # to have none is a fault of its own
        if name in taken or not re.search(rf"\b{re.escape(name)}\b", template):
            raise ConfigError(
                f"model.template_options.{name}: the model's chat template has no such option to "
                "set; leave it out"
            )


def open_sampler(
    config: Config, policy: Policy, chat: Bridge, *, beside_training: bool = False
) -> Sampler:
    refuse_long_context(policy.model.config, config.rollout.max_context)
    try:
        return make_sampler(
            config.sampler,
            model_folder=policy.folder,
            model=policy.model,
            stop_ids=chat.stop_ids,
            max_context=config.rollout.max_context,
            device=policy.device.type,
            dtype=policy.model.dtype,
            seed=config.train.seed,
            beside_training=beside_training,
        )
    except NotImplementedError as error:
        raise ConfigError(f"model.path: {policy.folder}: {error}") from None


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
    newest = newest_whole(directory.checkpoints)
    if newest is None:
        directory.rewind(-1)
        return 0, {}
    state = load_checkpoint(newest, model=policy.model, optimizer=optimizer, critic=critic)
    found = state.get("kind", kind)
    if found != kind:
        raise ConfigError(
            f"{directory.path}: holds a run of `turnfast {found}`; give another --run-dir, and to "
            f"go on from its weights --model.path {newest}"
        )
    step = int(state["step"])
    directory.rewind(step)
    return step, state
