"""Errors that end a step or a run.

Each text is for the user: it names the field, file or rank concerned and the fix. The command line
prints it without a traceback and exits with `exit_code`.
"""

from __future__ import annotations


class TurnfastError(Exception):
    """Base class of the errors that turnfast raises on purpose."""

    exit_code = 1


class ConfigError(TurnfastError):
    """The user's input cannot be used: a recipe field, a flag, a file or a folder."""

    exit_code = 2


class CheckpointError(TurnfastError):
    """A checkpoint cannot be written or read."""


class RolloutError(TurnfastError):
    """Too many rollouts of a step failed, or the step timed out."""


class Interrupted(TurnfastError):
    """The run was asked to stop during a step."""


class OutOfMemory(TurnfastError):
    """A micro-batch does not fit in memory."""


class TrainingError(TurnfastError):
    """A loss, gradient or value is not finite, so the update was not applied."""


class TornStep(TurnfastError):
    """An optimizer step failed halfway: some weights are updated, others are not."""


class SyncError(TurnfastError):
    """The sampler does not sample with the trainer's weights."""


class RankError(TurnfastError):
    """Another rank failed, disappeared, or holds different weights."""
