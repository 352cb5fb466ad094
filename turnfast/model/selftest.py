"""Check a loaded model: its log-probs over packed rows and trees must equal its plain forward.

Two rows with a common beginning run through `hidden_states` and `linear_logprobs` in training mode,
once as packed rows and once as a tree. The expected log-probs come from the model's own forward on
each row in eval mode, with eager attention and the model's own logits. This finds differences that
the config does not name: a scale or bias of the logits, state carried from row to row, wrong
positions, dropout.

The rows are longer than the sliding window if that is at most LONGEST_WINDOW. With longer windows
one missing key among thousands is smaller than bfloat16 rounding, and long rows take seconds.

Cost: three forwards of about forty tokens (6,000 tokens with a window of 1,024), which read the
weights three times: 30 ms for the built-in model on one core, about 13 ms for 7 billion parameters
in bfloat16 on an H100.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..kernels import linear_logprobs
from ..packing.pack import batch_of
from ..packing.rows import rows_of
from ..types import Turn
from .architecture import sliding_window
from .device import default_tolerance
from .policy import Policy, hidden_states

LONGEST_WINDOW = 1024
SCORED = 16
"""Number of compared tokens at the end of each row; rows exceed the window by twice as many."""
LENGTH_WITHOUT_WINDOW = 24


def check_logprobs(policy: Policy) -> None:
    """Compare log-probs over packed rows and a tree with those of the model's plain forward.

    The model and torch's random state stay unchanged. The policy must not be compiled. Exceptions
    of the model's own code get a note that names model.path.

    Raises:
        ConfigError: the log-probs differ by more than rounding, or are not finite.
    """
    name = policy.model.config.model_type
    rows = _rows(policy.model.config)
    plain = _plain_logprobs(policy.model, rows)
    if not plain.isfinite().all():
        raise ConfigError(
            f"model.path: {name} gives log-probs that are not finite: its weights are damaged or "
            f"overflow {policy.model.dtype}; set model.dtype to 'float32' or use another model"
        )
    allowed = default_tolerance(policy.model.dtype, policy.device.type)
    for share_prefixes, layout in ((False, "packed rows"), (True, "a prefix tree")):
        try:
            packed = _packed_logprobs(policy, rows, share_prefixes=share_prefixes)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            error.add_note(f"model.path: {name} fails with {layout}; use another model")
            raise
        # the mean, because rounding can switch the experts of a single token
        gap = float((packed - plain).abs().mean(1).max())
        if not gap <= allowed:
            raise ConfigError(
                f"model.path: with {layout} the log-probs of {name} differ by {gap:.3g} on average "
                f"from its plain forward, more than {allowed:.3g} for rounding: it has a feature "
                "that is not supported; use another model"
            )


def _rows(architecture: Any) -> list[list[int]]:
    """Draw two rows of token ids with the same first half."""
    text = architecture.get_text_config()
    window = sliding_window(architecture)
    length = LENGTH_WITHOUT_WINDOW
    if window <= LONGEST_WINDOW:
        length = max(length, window + 2 * SCORED)
    length = min(length, getattr(text, "max_position_embeddings", None) or length)
    draw = random.Random(0)
    one, other = ([draw.randrange(text.vocab_size) for _ in range(length)] for _ in range(2))
    return [one, one[: length // 2] + other[length // 2 :]]


@torch.no_grad()
def _plain_logprobs(model: Any, rows: list[list[int]]) -> Tensor:
    """[rows, SCORED] float32 log-probs of the last ids of each row, by the plain forward."""
    attention, training = model.config._attn_implementation, model.training
    model.config._attn_implementation = "eager"
    model.eval()
    try:
        ids = torch.tensor(rows, device=next(model.parameters()).device)
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        model.config._attn_implementation = attention
        model.train(training)
    logprobs = torch.log_softmax(logits[:, :-1][:, -SCORED:].float(), dim=-1)
    return logprobs.gather(2, ids[:, 1:][:, -SCORED:, None]).squeeze(2)


@torch.no_grad()
def _packed_logprobs(policy: Policy, rows: list[list[int]], *, share_prefixes: bool) -> Tensor:
    """[rows, SCORED] log-probs of the last ids of each row, as in training."""
    turns = [[_scored_turn(ids)] for ids in rows]
    ones = [1.0] * len(rows)
    batch = batch_of(rows_of(turns, ones), ones, policy.device, share_prefixes=share_prefixes)
    result = linear_logprobs(
        hidden_states(policy, batch),
        policy.head_VD,
        batch.rows_N,
        batch.targets_N,
        softcap=policy.softcap,
    )
    return result.logprobs.view(len(rows), -1)


def _scored_turn(ids: list[int]) -> Turn:
    start = max(1, len(ids) - SCORED)
    return Turn(
        prompt_ids=tuple(ids[:start]),
        sampled_ids=tuple(ids[start:]),
        logprobs=(0.0,) * (len(ids) - start),
        text="",
        finish="stop",
    )
