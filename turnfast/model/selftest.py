"""Whether a loaded model is the same model over packed rows and trees, asked before it is trained.

Two rows that begin alike go through what training uses, once as packed rows and once as a tree, in
training mode: `hidden_states`, then `linear_logprobs`. The log-probs must be those that the model's
own plain forward gives each row, in eval mode, with transformers' eager attention and the model's
own logits. So whatever a model needs and does not get is found here, also what nobody thought of: a
scale or bias of the logits, state that runs from row to row, positions made up, noise in training.

The rows are longer than a sliding window of up to LONGEST_WINDOW tokens. Beyond it one lost key in
thousands is less than bfloat16 rounds away, and long rows cost seconds: there it stands on the
window that the model itself asks for (attention.py), and on the tests of the kernels.

It costs three forwards of some forty tokens, which is reading the weights three times: 30 ms for
the built-in model on one core, and as much again as a process's first forward takes anyway; for 7
billion parameters in bfloat16 42 GB, or 13 ms at an H100's bandwidth, and with a window of 1,024
about 6,000 tokens, a fraction of a second.
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
"""Tokens at the end of each row that are compared: beyond a window there are twice as many."""
PLAIN_TOKENS = 24
WAY_OUT = "take another model, for the gradient would be that of a different one"


def check_logprobs(policy: Policy) -> None:
    """Compare a policy's log-probs over packed rows and a tree with those of its plain forward.

    It changes nothing of the model, draws no random numbers of torch's, and wants a policy that is
    not compiled.

    Raises:
        ConfigError: they differ by more than rounding, or the model cannot be run that way.
    """
    name = policy.model.config.model_type
    rows = _rows(policy.model.config)
    plain = _plain_logprobs(policy.model, rows)
    if not plain.isfinite().all():
        raise ConfigError(
            f"model.path: {name} gives log-probs that are not finite; its weights are damaged, or "
            f"too large for {policy.model.dtype}"
        )
    allowed = default_tolerance(policy.model.dtype, policy.device.type)
    for share, shape in ((False, "packed rows"), (True, "a prefix tree")):
        try:
            ours = _logprobs(policy, rows, share_prefixes=share)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise ConfigError(
                f"model.path: {name} cannot be run over {shape}, its code fails there: "
                f"{type(error).__name__}: {error}; take another model"
            ) from error
        # a mean: where a mixture of experts is undecided, rounding moves a single token far
        gap = float((ours - plain).abs().mean(1).max())
        if not gap <= allowed:
            raise ConfigError(
                f"model.path: over {shape} the log-probs of {name} differ by {gap:.3g} on average "
                f"from its plain forward (rounding allows {allowed:.3g}); it has something that "
                f"is not computed here, {WAY_OUT}"
            )


def _rows(architecture: Any) -> list[list[int]]:
    """Two rows of ids that share their first half."""
    text = architecture.get_text_config()
    window = sliding_window(architecture)
    length = PLAIN_TOKENS
    if window <= LONGEST_WINDOW:
        length = max(length, window + 2 * SCORED)
    length = min(length, getattr(text, "max_position_embeddings", None) or length)
    draw = random.Random(0)
    one, other = ([draw.randrange(text.vocab_size) for _ in range(length)] for _ in range(2))
    return [one, one[: length // 2] + other[length // 2 :]]


@torch.no_grad()
def _plain_logprobs(model: Any, rows: list[list[int]]) -> Tensor:
    """[rows, scored] float32 log-probs of the last ids of each row."""
    before, was_training = model.config._attn_implementation, model.training
    model.config._attn_implementation = "eager"
    model.eval()
    try:
        ids = torch.tensor(rows, device=next(model.parameters()).device)
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        model.config._attn_implementation = before
        model.train(was_training)
    logprobs = torch.log_softmax(logits[:, :-1][:, -SCORED:].float(), dim=-1)
    return logprobs.gather(2, ids[:, 1:][:, -SCORED:, None]).squeeze(2)


@torch.no_grad()
def _logprobs(policy: Policy, rows: list[list[int]], *, share_prefixes: bool) -> Tensor:
    """[rows, scored] log-probs of the last ids of each row, as training computes them."""
    turns = [[_scored_turn(ids)] for ids in rows]
    ones = [1.0] * len(rows)
    batch = batch_of(rows_of(turns, ones), ones, policy.device, share_prefixes=share_prefixes)
    found = linear_logprobs(
        hidden_states(policy, batch),
        policy.head_VD,
        batch.rows_N,
        batch.targets_N,
        softcap=policy.softcap,
    )
    return found.logprobs.view(len(rows), -1)


def _scored_turn(ids: list[int]) -> Turn:
    start = max(1, len(ids) - SCORED)
    return Turn(
        prompt_ids=tuple(ids[:start]),
        sampled_ids=tuple(ids[start:]),
        logprobs=(0.0,) * (len(ids) - start),
        text="",
        finish="stop",
    )
