"""Optional copies of metrics.jsonl: TensorBoard, Weights & Biases, trackio.

A package is imported only if the recipe names it. A sink that fails during the run is closed with a
warning, because metrics.jsonl has everything.
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
    """A receiver of the lines of metrics.jsonl."""

    def log(self, step: int, metrics: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


def open_sinks(
    names: Sequence[str], run_dir: Path, recipe: Mapping[str, Any], *, resume: bool = False
) -> tuple[Sink, ...]:
    """Open the sinks of `train.sinks`; with `resume` trackers continue the run of that name.

    Raises:
        ConfigError: a package is not installed.
    """
    return tuple(_SafeSink(name, _open(name, run_dir, recipe, resume)) for name in names)


def check_sinks(names: Sequence[str]) -> None:
    """Raise ConfigError if the package of a sink is not installed."""
    for name in names:
        _import(name)


def _open(name: str, run_dir: Path, recipe: Mapping[str, Any], resume: bool) -> Sink:
    module = _import(name)
    if name == "tensorboard":
        return _TensorBoard(module.SummaryWriter(str(run_dir / "tensorboard")))
    options: dict[str, Any] = {"project": PROJECT, "name": run_dir.name, "config": dict(recipe)}
    if name == "wandb":
        options |= {"dir": str(run_dir), "resume": "auto" if resume else "never"}
    else:
        options |= {"resume": "allow" if resume else "never"}
    module.init(**options)
    return _Tracker(module)


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    except ImportError as error:
        raise ConfigError(
            f"train.sinks: {name} is not installed ({error}); install it with "
            "pip install 'turnfast[tracking]' or remove it from train.sinks"
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
    """wandb or trackio, which have the same functions."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._module.log(dict(metrics), step=step)

    def close(self) -> None:
        self._module.finish()


class _SafeSink:
    """Forwards numbers to a sink until its first exception."""

    def __init__(self, name: str, sink: Sink) -> None:
        self._name = name
        self._sink: Sink | None = sink

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        numbers = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
        if self._sink is None:
            return
        try:
            self._sink.log(step, numbers)
        except Exception as error:  # a tracker may raise anything; the run must continue
            log.warning("train.sinks: %s failed and is closed: %s", self._name, error)
            self._sink = None

    def close(self) -> None:
        if self._sink is None:
            return
        try:
            self._sink.close()
        except Exception as error:  # as above
            log.warning("train.sinks: %s could not be closed: %s", self._name, error)
        self._sink = None
