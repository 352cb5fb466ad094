"""Load new weights into the sampler, and check that it samples with them.

An engine with old weights, or with keys and values computed by them, still answers, so every sync
is checked:

- At the start of a run a probe: the engine continues fixed prompts, and its log-probabilities are
  compared with the trainer's for the same ids.
- After a step, by the next step's tokens. The pass that computes their gradient yields the
  trainer's log-probability of every sampled token; if these differ from the sampler's, the run ends
  before the update (`check_logprob_gap`).
- Where that pass is missing or uses other weights (before an evaluation, with `train.overlap`), by
  a short probe.

A sampler that uses the trainer's own module is probed once, at the start.

No comparison detects a tensor that none of the tokens uses, such as the embedding of an absent id,
or a change below the tolerance (at lr 1e-6 a bfloat16 policy changes less per step than two
bfloat16 forwards differ). Therefore `load_weights` itself refuses an incomplete set of tensors.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ConfigError, SyncError
from ..model.lora import merged
from . import Completion, Request, Sampler

NUM_PROMPTS = 8
PROMPT_TOKENS = 80
"""At least two blocks of vLLM's prefix cache, so that the probe would use stale blocks."""
NEW_TOKENS = 8

SHORT_PROMPTS = 2
SHORT_TOKENS = 40
"""More than one block of vLLM's prefix cache: the token after the block is always computed."""
SHORT_NEW_TOKENS = 2
PROBE_ID = -1

MEAN_SHARE, LARGEST_SHARE = 0.2, 10.0
"""Allowed mean and largest gap of a step's tokens, over the probe's tolerance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Prompts of equal length that the engine continues greedily after a sync."""

    prompts: tuple[tuple[int, ...], ...]
    max_new_tokens: int = NEW_TOKENS

    @property
    def short(self) -> Probe:
        """A probe with an eighth of the tokens."""
        return Probe(
            prompts=tuple(prompt_ids[:SHORT_TOKENS] for prompt_ids in self.prompts[:SHORT_PROMPTS]),
            max_new_tokens=SHORT_NEW_TOKENS,
        )


def make_probe(vocab_size: int, max_context: int) -> Probe:
    """Random prompts with as many different ids as possible, the same in every run."""
    length = min(PROMPT_TOKENS, max_context - NEW_TOKENS)
    if length < 1:
        raise ConfigError(
            f"rollout.max_context: {max_context} tokens are too few for the probe of the sampler's "
            f"weights; set it to {NEW_TOKENS + 1} or more"
        )
    generator = random.Random(0)
    ids: list[int] = []
    while len(ids) < NUM_PROMPTS * length:
        ids += generator.sample(range(vocab_size), min(vocab_size, NUM_PROMPTS * length - len(ids)))
    return Probe(
        prompts=tuple(tuple(ids[i * length : (i + 1) * length]) for i in range(NUM_PROMPTS))
    )


def sync_weights(model: torch.nn.Module, sampler: Sampler, probe: Probe, tolerance: float) -> float:
    """Load the model's parameters, with an adapter merged, into the sampler and run the probe.

    A sampler that is awake first answers one prompt of the probe, so that a prefix cache which is
    not dropped causes a cache hit in the probe.

    Returns:
        The largest |log-prob(sampler) - log-prob(trainer)| over the probe's sampled tokens.
    Raises:
        SyncError: the sampler refused the tensors, still uses its old prefix cache, or differs by
            more than `tolerance`.
    """
    if not sampler.asleep:
        _continue(sampler, probe.prompts[:1], max_new_tokens=1)
    _load(model, sampler)
    gap, completions = compare(model, sampler, probe)
    cached = max(completion.cached_tokens for completion in completions)
    if cached:
        raise SyncError(
            f"after new weights were loaded, {cached} tokens of the probe came from the prefix "
            "cache, which was computed with the old weights"
        )
    _check_gap(gap, tolerance, "on the probe")
    return gap


def sync_after_step(
    model: torch.nn.Module, sampler: Sampler, probe: Probe, tolerance: float, *, probed: bool
) -> float:
    """Load the model's parameters into the sampler after a step.

    Args:
        probed: run the short probe. Otherwise the next samples must pass `check_logprob_gap` before
            they are trained on.
    Returns:
        The gap of `sync_weights`; 0 without a probe.
    Raises:
        SyncError: see `sync_weights`.
    """
    if probed and not sampler.shares(model):
        return sync_weights(model, sampler, probe.short, tolerance)
    _load(model, sampler)
    return 0.0


def check_logprob_gap(
    mean_gap: float, largest_gap: float, *, tolerance: float, dtype: torch.dtype
) -> None:
    """Refuse sampled tokens that were not sampled with the trainer's weights.

    The tolerance is for the largest gap of the probe's few tokens. The mean over all sampled tokens
    may be a fifth of it. The largest of so many tokens may be ten times the tolerance in float32;
    in lower precision it is not checked, as rounding alone moves improbable tokens far.

    Args:
        mean_gap, largest_gap: |log-prob(sampler) - log-prob(trainer)| over all tokens sampled since
            the last sync, at the sampling temperature.
    Raises:
        SyncError: a gap is too large or not a number.
    """
    _check_gap(mean_gap, MEAN_SHARE * tolerance, "on average over the tokens of this step")
    if dtype == torch.float32:
        _check_gap(largest_gap, LARGEST_SHARE * tolerance, "on a token of this step")


def compare(
    model: torch.nn.Module, sampler: Sampler, probe: Probe
) -> tuple[float, list[Completion]]:
    """Largest |Δ log-prob| between sampler and model on the probe's greedy continuations."""
    completions = _continue(sampler, probe.prompts, max_new_tokens=probe.max_new_tokens)
    rows = [p + c.sampled_ids for p, c in zip(probe.prompts, completions, strict=True)]
    start = len(probe.prompts[0])
    gaps = []
    for ours, completion in zip(_logprobs(model, rows, start), completions, strict=True):
        theirs = torch.tensor(completion.logprobs, device=ours.device)
        gaps.append((ours[: len(theirs)] - theirs).abs().max())
    return float(torch.stack(gaps).max()), completions  # NaN if any is


def _check_gap(gap: float, tolerance: float, where: str) -> None:
    if not gap <= tolerance:  # also true for NaN
        raise SyncError(
            f"the sampler's log-probs differ from the trainer's by {gap:.3g} {where} "
            f"(allowed: {tolerance:.3g}): it does not sample with the trained weights. Likely: the "
            "engine ignored a tensor; keys and values of the old weights are still cached; engine "
            "and trainer compute in different precision (then raise sampler.probe_tolerance)"
        )


def _load(model: torch.nn.Module, sampler: Sampler) -> None:
    sampler.load_weights(merged(model, model.named_parameters()))


@torch.no_grad()
def _logprobs(model: Any, rows: Sequence[Sequence[int]], start: int) -> torch.Tensor:
    """Log-probs of row[start:] for each row, float32 [rows, longest row - start]."""
    # padding on the right is not seen by the tokens of a causal model
    longest = max(len(row) for row in rows)
    padded = [list(row) + [0] * (longest - len(row)) for row in rows]
    device = next(model.parameters()).device
    ids = torch.tensor(padded, device=device)
    was_training = model.training
    if was_training:
        model.eval()
    try:
        keep = torch.arange(start - 1, longest - 1, device=device)
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits.float()
    finally:
        if was_training:
            model.train()
    logprobs = torch.log_softmax(logits, dim=-1)
    return logprobs.gather(2, ids[:, start:, None]).squeeze(2)


def _continue(
    sampler: Sampler, prompts: Sequence[tuple[int, ...]], *, max_new_tokens: int
) -> list[Completion]:
    if sampler.num_pending:
        raise SyncError(f"{sampler.num_pending} requests are in flight: finish or abort them first")
    for index, prompt_ids in enumerate(prompts):
        sampler.submit(
            Request(
                id=PROBE_ID - index,
                prompt_ids=prompt_ids,
                max_new_tokens=max_new_tokens,
                temperature=0.0,
                seed=0,
            )
        )
    done: dict[int, Completion] = {}
    for _ in range(len(prompts) * (max_new_tokens + 1)):
        if len(done) == len(prompts):
            break
        done |= {completion.id: completion for completion in sampler.step()}
    if len(done) < len(prompts):
        raise SyncError(f"the sampler finished {len(done)} of {len(prompts)} probe requests")
    return [done[PROBE_ID - index] for index in range(len(prompts))]
