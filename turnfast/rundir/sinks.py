"""Optional copies of metrics.jsonl: TensorBoard, Weights & Biases, trackio.

Each package is imported at one place, here, and only when the recipe names it. A sink that fails
while the run is under way is dropped with a warning: metrics.jsonl has everything anyway.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from ..errors import ConfigError

PROJECT = "turnfast"

log = logging.getLogger("turnfast")


class Sink(Protocol):
    """Takes what metrics.jsonl takes."""

    def log(self, step: int, metrics: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


def open_sinks(
    names: Sequence[str], run: Path, recipe: Mapping[str, Any], *, resume: bool = False
) -> tuple[Sink, ...]:
    """One sink per name of `train.sinks`; with `resume` trackers go on with the run they know.

    Raises:
        ConfigError: the package is not installed or refuses to start.
    """
    return tuple(_Guarded(name, _open(name, run, recipe, resume)) for name in names)


def _open(name: str, run: Path, recipe: Mapping[str, Any], resume: bool) -> Sink:
    module = _import(name)
    try:
        if name == "tensorboard":
            return _TensorBoard(module.SummaryWriter(str(run / "tensorboard")))
        options: dict[str, Any] = {"project": PROJECT, "name": run.name, "config": dict(recipe)}
        if name == "wandb":
            options |= {"dir": str(run), "resume": "auto" if resume else "never"}
        else:
            options |= {"resume": "allow" if resume else "never"}
        module.init(**options)
        return _Tracker(module)
    except Exception as error:  # a tracker may raise anything: no account, no network, no disk
        raise ConfigError(
            f"train.sinks: {name} could not be started ({error}); leave it out of train.sinks, "
            "metrics.jsonl is always written"
        ) from error


def check_sinks(names: Sequence[str]) -> None:
    """Raises ConfigError if one of them is not installed."""
    for name in names:
        _import(name)


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    except ImportError as error:
        raise ConfigError(
            f"train.sinks: {name} is not installed ({error}); install it with "
            "pip install 'turnfast[tracking]', or leave it out"
        ) from None


class _TensorBoard:
    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Tracker:
    """wandb and trackio share one interface."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._module.log(dict(metrics), step=step)

    def close(self) -> None:
        self._module.finish()


class _Guarded:
    """Passes numbers on until the first failure."""

    def __init__(self, name: str, sink: Sink) -> None:
        self._name = name
        self._sink: Sink | None = sink

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        numbers = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
        if self._sink is None:
            return
        try:
            self._sink.log(step, numbers)
        except Exception as error:  # losing a copy must not lose the run
            log.warning("%s is dropped for the rest of the run: %s", self._name, error)
            self._sink = None

    def close(self) -> None:
        if self._sink is None:
            return
        try:
            self._sink.close()
        except Exception as error:  # as above
            log.warning("%s did not close: %s", self._name, error)
        self._sink = None
