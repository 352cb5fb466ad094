"""From a recipe to a tuned model folder: what `turnfast sft` does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .config import Config
from .console import Progress
from .loss import Update
from .metrics import RunDir
from .model import load_policy, pick_device
from .run import model_folder, open_chat, open_env
from .sft import sft


def warm_start(
    config: Config, run_dir: Path, *, should_stop: Callable[[], bool] = lambda: False
) -> Path:
    """Tune the recipe's model on its environment's demonstrations.

    Returns:
        `run_dir/model`, a Hugging Face folder for `--model.path`.
    """
    env = open_env(config)
    with (
        RunDir.create(run_dir, config, resumable=False) as directory,
        Progress(run_dir, config.sft.steps, label="warm start") as progress,
    ):
        policy = load_policy(
            config.model, model_folder(config, env, run_dir), pick_device(config.train.device)
        )

        def report(step: int, done: Update) -> None:
            figures = {"loss": -done.logprob, "entropy": done.entropy, "grad_norm": done.grad_norm}
            directory.log(step, figures)
            progress.step(step, figures)

        seed = config.train.seed
        chat = open_chat(policy, env)
        sft(policy, env, chat, config.sft, seed=seed, report=report, should_stop=should_stop)
        folder = run_dir / "model"
        policy.model.save_pretrained(folder)
        policy.tokenizer.save_pretrained(folder)
    return folder
