"""From a recipe to a tuned model folder: what `turnfast sft` does."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from .config.schema import Config
from .model import load_policy, pick_device
from .model.lora import add_adapter
from .report.console import Progress
from .run import is_due, model_folder, open_chat, open_env, restore
from .rundir.checkpoint import save_checkpoint, save_model
from .rundir.directory import RunDir
from .sft import sft, sft_optimizer
from .update.budget import OutOfMemory
from .update.update import TrainingError, Update

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
            config.model, model_folder(config, env, run_dir), pick_device(config.train.device)
        )
        add_adapter(policy.model, config.model.lora, seed=config.train.seed)
        optimizer = sft_optimizer(policy, config.sft)
        begun = done = restore(directory, policy, optimizer, kind="sft")[0] if resume else 0
        save = partial(
            save_checkpoint,
            directory.checkpoints,
            model=policy.model,
            optimizer=optimizer,
            tokenizer=policy.tokenizer,
            state={"kind": "sft"},  # the order of the data is a function of the seed
            keep=config.train.keep_checkpoints,
        )
        with Progress(run_dir, config.sft.steps, done=done, label="warm start") as progress:

            def report(step: int, update: Update) -> None:
                nonlocal done
                done = step
                figures = {
                    "loss": -update.logprob,
                    "entropy": update.entropy,
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
                    open_chat(config.model, policy, env),
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
