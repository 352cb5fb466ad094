"""Report an allocator's out-of-memory error with the setting to change."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import TurnfastError


@contextmanager
def explain_out_of_memory(kind: type[TurnfastError], text: str) -> Iterator[None]:
    """Raise `kind(text)` in place of an out-of-memory error; other errors pass.

    The frames of the failed call are cleared, so that their tensors are freed before a checkpoint
    is written.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
        traceback.clear_frames(error.__traceback__)
        raise kind(f"{text} ({reason or type(error).__name__})") from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator raised this error. torch's CPU allocator raises a plain RuntimeError."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return any(sign in text for sign in ("can't allocate memory", "not enough memory", "bad_alloc"))


def smaller_microbatches(field: str, tokens: int, *, least: int, checkpointing: bool) -> str:
    """The settings to try when a micro-batch does not fit in memory.

    Args:
        field: recipe field that limits the tokens of a micro-batch.
        tokens: its value.
        least: its smallest possible value.
        checkpointing: whether activations are checkpointed already.
    """
    half = max(tokens // 2, least)
    fixes = []
    if half < tokens:
        fixes.append(f"lower {field} from {tokens} to {half}")
    if not checkpointing:
        fixes.append("set model.checkpointing = true")
    if not fixes:
        fixes.append(f"{field} = {tokens} cannot be lowered; train an adapter with model.lora.r")
    return f"out of memory in a micro-batch: {'; if that is not enough, '.join(fixes)}"
