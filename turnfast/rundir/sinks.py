"""Optional copies of metrics.jsonl: TensorBoard, Weights & Biases, trackio.

A package is imported only if the recipe names it. A sink that fails during the run gets no more
metrics and the run continues, because metrics.jsonl has everything.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import ConfigError

PROJECT = "turnfast"

log = logging.getLogger("turnfast")


class Sink:
    """Forwards numbers to a tracker until its first exception."""

    def __init__(self, name: str, log: Callable[..., Any], close: Callable[[], Any]) -> None:
        self._name, self._log, self._close = name, log, close
        self._open = True

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        if not self._open:
            return
        numbers = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
        try:
            self._log(numbers, step=step)
        except Exception as error:  # a tracker may raise anything; the run must continue
            log.warning("train.sinks: %s failed and gets no more metrics: %s", self._name, error)
            self._open = False

    def close(self) -> None:
        if not self._open:
            return
        try:
            self._close()
        except Exception as error:  # as above
            log.warning("train.sinks: %s could not be closed: %s", self._name, error)
        self._open = False


def open_sinks(
    names: Sequence[str], run_dir: Path, recipe: Mapping[str, Any], *, resume: bool = False
) -> tuple[Sink, ...]:
    """Open the sinks of `train.sinks`; with `resume` trackers continue the run of that name.

    Raises:
        ConfigError: a package is not installed.
    """
    return tuple(_open(name, run_dir, recipe, resume) for name in names)


def check_sinks(names: Sequence[str]) -> None:
    """Raise ConfigError if the package of a sink is not installed."""
    for name in names:
        _import(name)


def _open(name: str, run_dir: Path, recipe: Mapping[str, Any], resume: bool) -> Sink:
    module = _import(name)
    if name == "tensorboard":
        writer = module.SummaryWriter(str(run_dir / "tensorboard"))

        def log_scalars(metrics: Mapping[str, float], *, step: int) -> None:
            for key, value in metrics.items():
                writer.add_scalar(key, value, step)
            writer.flush()

        return Sink(name, log_scalars, writer.close)
    options: dict[str, Any] = {"project": PROJECT, "name": run_dir.name, "config": dict(recipe)}
    if name == "wandb":
        options |= {"dir": str(run_dir), "resume": "auto" if resume else "never"}
    else:
        options |= {"resume": "allow" if resume else "never"}
    module.init(**options)
    return Sink(name, module.log, module.finish)


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    except ImportError as error:
        raise ConfigError(
            f"train.sinks: {name} is not installed ({error}); install it with "
            "pip install 'turnfast[tracking]' or remove it from train.sinks"
        ) from None
