"""New weights into the sampler, and proof that it samples with them.

Every failure of this hand-over that others have met is silent: the engine answers, with the weights
of yesterday or with keys and values computed by them. So no sync goes unproven:

- A run starts with a probe: the engine continues fixed prompts, and its log-probabilities are
  compared with the trainer's own of the same ids.
- After a step the proof costs nothing. The pass that computes the next gradient gives the trainer's
  log-probability of every token that was sampled since; if these are not the sampler's, the run
  ends before anything is learned from them (`check_logprob_gap`).
- Where that pass does not come, or not with the same weights (an evaluation, rollouts that are a
  step ahead), a short probe takes its place.

A sampler that samples with the trainer's own module needs no proof after the first.

What no comparison can see: a tensor that none of the tokens feels, such as the embedding row of an
id that does not occur, and a change smaller than the tolerance (a bfloat16 policy at lr 1e-6 moves
less per step than two bfloat16 forwards differ). Against these the samplers themselves refuse an
incomplete set of tensors: see `VllmSampler.load_weights`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import SyncError
from ..metrics.reduce import Max, Metric
from ..model.lora import merged
from . import Completion, Request, Sampler

NUM_PROMPTS = 8
PROMPT_TOKENS = 80
"""Two blocks of vLLM's prefix cache at least, so that stale blocks would be used."""
NEW_TOKENS = 8

SHORT_PROMPTS = 2
SHORT_TOKENS = 40
"""A whole block of vLLM's prefix cache, and the token behind it that is always computed."""
SHORT_NEW_TOKENS = 2
PROBE_ID = -1

MEAN_SHARE, LARGEST_SHARE = 0.2, 10.0
"""What the mean and the largest gap of a step's tokens may be, over the probe's tolerance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Prompts of equal length that the engine continues greedily after every sync."""

    prompts: tuple[tuple[int, ...], ...]
    max_new_tokens: int = NEW_TOKENS

    @property
    def short(self) -> Probe:
        """The beginnings of some of its prompts, an eighth of its tokens."""
        return Probe(
            prompts=tuple(prompt_ids[:SHORT_TOKENS] for prompt_ids in self.prompts[:SHORT_PROMPTS]),
            max_new_tokens=SHORT_NEW_TOKENS,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """Attributes:
    gap: largest |log-prob(engine) - log-prob(trainer)| over the probe's tokens; 0 without any.
    num_tokens: how many of these were compared; without any the next step's tokens are the proof.
    time_s: the whole sync, probe included.
    """

    gap: float
    num_tokens: int
    time_s: float

    def metrics(self) -> dict[str, Metric]:
        """The metrics of the sync, under the names of metrics.jsonl."""
        return {"sync_gap": Max(self.gap)}


def make_probe(vocab_size: int, max_context: int, seed: int = 0) -> Probe:
    """Prompts that touch as many different ids as they have tokens, shuffled by `seed`."""
    length = min(PROMPT_TOKENS, max_context - NEW_TOKENS)
    if length < 1:
        raise ValueError(f"max_context {max_context} leaves no room for a probe")
    generator = random.Random(seed)
    ids: list[int] = []
    while len(ids) < NUM_PROMPTS * length:
        ids += generator.sample(range(vocab_size), min(vocab_size, NUM_PROMPTS * length - len(ids)))
    return Probe(
        prompts=tuple(tuple(ids[i * length : (i + 1) * length]) for i in range(NUM_PROMPTS))
    )


def sync_weights(
    model: torch.nn.Module, sampler: Sampler, probe: Probe, tolerance: float
) -> SyncReport:
    """Push the model's parameters into the sampler, with an adapter the merged ones, and compare
    the two on the probe.

    While the sampler is awake it is asked for one prompt of the probe before the push, so that a
    prefix cache which survives the push is hit, and found.

    Raises:
        SyncError: the sampler refused the tensors, still uses its old prefix cache, or differs by
            more than `tolerance`.
    """
    begin = time.perf_counter()
    if not sampler.asleep:
        _continue(sampler, probe.prompts[:1], max_new_tokens=1)
    _load(model, sampler)
    gap, completions = compare(model, sampler, probe)
    cached = max(completion.cached_tokens for completion in completions)
    if cached:
        raise SyncError(
            f"after the new weights were loaded, {cached} tokens of the probe came from the prefix "
            "cache: they were computed with the old weights, and so would be the rollouts' tokens"
        )
    _refuse_gap(gap, tolerance, "on the probe")
    num_tokens = sum(len(completion.sampled_ids) for completion in completions)
    return SyncReport(gap=gap, num_tokens=num_tokens, time_s=time.perf_counter() - begin)


def sync_after_step(
    model: torch.nn.Module, sampler: Sampler, probe: Probe, tolerance: float, *, probed: bool
) -> SyncReport:
    """Push the model's parameters into the sampler after a step.

    Args:
        probed: use the short form of a probe that has passed whole; else what is sampled next must
            go through `check_logprob_gap` before it is trained on.
    Raises:
        SyncError: see `sync_weights`.
    """
    if probed and not sampler.shares(model):
        return sync_weights(model, sampler, probe.short, tolerance)
    begin = time.perf_counter()
    _load(model, sampler)
    return SyncReport(gap=0.0, num_tokens=0, time_s=time.perf_counter() - begin)


def check_logprob_gap(
    mean_gap: float, largest_gap: float, *, tolerance: float, dtype: torch.dtype
) -> None:
    """Refuse sampled tokens that are not of the trainer's weights.

    The tolerance is of the largest gap of the probe's few tokens. The mean over all that were
    sampled may be a fifth of it. The largest of so many is further out: in float32 it may be ten
    times the tolerance; in lower precision it says nothing, as rounding alone moves single tokens
    of small probability far.

    Args:
        mean_gap, largest_gap: |log-prob(sampler) - log-prob(trainer)| over all tokens sampled since
            the last sync, at the sampling temperature.
    Raises:
        SyncError: before anything was learned from them.
    """
    _refuse_gap(mean_gap, MEAN_SHARE * tolerance, "on average over the tokens of this step")
    if dtype == torch.float32:
        _refuse_gap(largest_gap, LARGEST_SHARE * tolerance, "on a token of this step")


def _refuse_gap(gap: float, tolerance: float, where: str) -> None:
    if not gap <= tolerance:  # also when it is not a number
        raise SyncError(
            f"the sampler's log-probs differ from the trainer's by {gap:.3g} {where} "
            f"(allowed: {tolerance:.3g}): it does not sample with the weights that were trained. "
            "Likely: a tensor was not handed over or was ignored by the engine; keys and values of "
            "the old weights are still cached; engine and trainer compute in different precision "
            "(then raise sampler.probe_tolerance)"
        )


def compare(
    model: torch.nn.Module, sampler: Sampler, probe: Probe
) -> tuple[float, list[Completion]]:
    """Largest |Δ log-prob| between sampler and model on the probe's greedy continuations."""
    completions = _continue(sampler, probe.prompts, max_new_tokens=probe.max_new_tokens)
    rows = [p + c.sampled_ids for p, c in zip(probe.prompts, completions, strict=True)]
    start = len(probe.prompts[0])
    gap = 0.0
    for ours, completion in zip(_logprobs(model, rows, start, 1.0), completions, strict=True):
        theirs = torch.tensor(completion.logprobs, device=ours.device)
        worst = (ours[: len(theirs)] - theirs).abs().max()
        gap = float("nan") if worst.isnan() else max(gap, float(worst))
        if worst.isnan():
            break
    return gap, completions


def _load(model: torch.nn.Module, sampler: Sampler) -> None:
    sampler.wake()
    try:
        sampler.load_weights(merged(model, model.named_parameters()))
    except (KeyError, ValueError, RuntimeError) as error:
        text = error.args[0] if error.args else type(error).__name__
        raise SyncError(f"the sampler could not take the new weights: {text}") from error


def teacher_forced_logprobs(
    model: torch.nn.Module, ids: Sequence[int], start: int, temperature: float = 1.0
) -> torch.Tensor:
    """Log-probs of ids[start:], each given all before it, by the plain forward of the model.

    Args:
        start: at least 1; the first id that is scored.
    Returns:
        float32 [len(ids) - start], natural log.
    """
    return _logprobs(model, [tuple(ids)], start, temperature)[0]


@torch.no_grad()
def _logprobs(
    model: Any, rows: Sequence[Sequence[int]], start: int, temperature: float
) -> torch.Tensor:
    # padded on the right, where no real token of a causal model looks
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
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
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
