"""Reference gradient and log-probs of a step: float64, one trajectory at a time."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from harness.recorded import Recording
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from turnfast.kernels import turn_policy_loss

from turnfast.model import Policy, hidden_states
from turnfast.types import Batch, Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A trajectory as one row: prompt and completion; `sampled` marks the sampled ids."""

    prompt: list[int]
    completion: list[int]
    sampled: list[int]
    logprobs: list[float]
    advantages: list[float]


def samples_of(recording: Recording) -> list[list[Sample]]:
    """The trained trajectories, by group."""
    return [
        [
            _sample(*pair)
            for pair in zip(group.trajectories, credit.advantages, strict=True)
            if not pair[0].left_out
        ]
        for group, credit in zip(recording.groups, recording.credits, strict=True)
        if credit.has_signal
    ]


def _sample(trajectory: Trajectory, advantages: tuple[float, ...]) -> Sample:
    completion: list[int] = []
    sampled: list[int] = []
    logprobs: list[float] = []
    each: list[float] = []
    for k, turn in enumerate(trajectory.turns):
        if turn.restart:
            raise SystemExit("a trajectory with a rewritten history cannot be represented in TRL")
        given = turn.prompt_ids if k else ()
        completion += [*given, *turn.sampled_ids]
        sampled += [0] * len(given) + [1] * len(turn.sampled_ids)
        logprobs += [0.0] * len(given) + list(turn.logprobs)
        each += [0.0] * len(given) + [advantages[k]] * len(turn.sampled_ids)
    return Sample(
        prompt=list(trajectory.turns[0].prompt_ids),
        completion=completion,
        sampled=sampled,
        logprobs=logprobs,
        advantages=each,
    )


def truth_of(policy: Policy, recording: Recording) -> tuple[list[Tensor], Tensor]:
    """Float64 gradients of all parameters, and log-probs of all sampled tokens in order."""
    config = deepcopy(policy.model.config)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).to(policy.device)
    model.load_state_dict(policy.model.state_dict())
    samples = [sample for group in samples_of(recording) for sample in group]
    count = sum(sum(sample.sampled) for sample in samples)
    found = []
    for sample in samples:
        ids = torch.tensor([sample.prompt + sample.completion], device=policy.device)
        logits = model(ids, use_cache=False).logits[0, len(sample.prompt) - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(1, ids[0, len(sample.prompt) :, None]).squeeze(1)
        live = torch.tensor(sample.sampled, dtype=torch.bool, device=policy.device)
        # on policy the ratio is 1, and its gradient is that of the log-prob
        advantages = torch.tensor(sample.advantages, dtype=torch.float64, device=policy.device)
        (-(logprobs * advantages)[live].sum() / count).backward()
        found.append(logprobs.detach()[live])
    return gradient_of(model), torch.cat(found).cpu()


def step_of(policy: Policy, batches: Sequence[Batch]) -> Tensor:
    """Run turnfast's step; leaves gradients in the model, returns log-probs in order."""
    policy.model.zero_grad()
    found = []
    for batch in batches:
        out = turn_policy_loss(
            hidden_states(policy, batch),
            policy.head_VD,
            batch.rows_N,
            batch.targets_N,
            batch.turns_N,
            batch.advantages_K,
            weights=batch.weights_N,
        )
        out.loss.backward()
        trajectories = batch.sequences_K[batch.turns_N.long()].tolist()
        found += list(zip(trajectories, out.logprobs.detach().tolist(), strict=True))
    # micro-batches hold whole trajectories in any order
    found.sort(key=lambda pair: pair[0])
    return torch.tensor([logprob for _, logprob in found])


def gradient_of(model: PreTrainedModel) -> list[Tensor]:
    """Copies of all gradients on the host."""
    return [p.grad.to("cpu", copy=True) for p in model.parameters() if p.grad is not None]


def gradient_error(gradient: Sequence[Tensor], true: Sequence[Tensor]) -> float:
    """Largest absolute difference over all parameters, relative to the largest entry."""
    largest = difference = 0.0
    for found, expected in zip(gradient, true, strict=True):  # one by one to save memory
        largest = max(largest, float(expected.abs().max()))
        difference = max(difference, float((found.double() - expected.double()).abs().max()))
    return difference / largest


def logprob_error(logprobs: Tensor, true: Tensor) -> float:
    """Largest difference; tokens without advantage may be NaN."""
    error = (logprobs.double() - true).abs()
    return float(error[~error.isnan()].max())
