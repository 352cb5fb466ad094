"""The reference policy of the KL term: a frozen copy of the initial policy, or another model.

It costs one forward pass over the rows of each step and a second copy of the weights in the
model's dtype (14 GiB for 7 billion parameters in bfloat16). With a LoRA adapter the initial policy
needs no copy: it is the policy with its adapter disabled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..config.schema import LossConfig, ModelConfig
from ..errors import ConfigError
from ..kernels import linear_logprobs
from ..model import Policy, hidden_states, load_policy
from ..model.lora import adapted_layers, without_adapter
from ..types import Batch


def open_reference(loss: LossConfig, model: ModelConfig, policy: Policy) -> Policy | None:
    """Open the model of `loss.reference`; returns None if `loss.kl_coef` is 0.

    Raises:
        ConfigError: the folder does not exist, or its model has another vocabulary.
    """
    if loss.kl_coef == 0.0:
        return None
    if loss.reference == "start" and adapted_layers(policy.model):
        return policy
    folder = policy.folder if loss.reference == "start" else Path(loss.reference).expanduser()
    if not folder.is_dir() and loss.reference != "start":
        raise ConfigError(f"loss.reference: no folder {folder}; use 'start' or a model folder")
    reference = load_policy(model, folder, policy.device)
    if len(reference.head_VD) != len(policy.head_VD):
        raise ConfigError(
            f"loss.reference: {folder} has a vocabulary of {len(reference.head_VD)} tokens, the "
            f"policy has {len(policy.head_VD)}; use a model of the same family"
        )
    reference.model.requires_grad_(False)
    return reference


@torch.no_grad()
def with_reference(
    batches: Sequence[Batch], reference: Policy, loss: LossConfig, *, temperature: float
) -> list[Batch]:
    """The batches with `ref_logprobs_N`, at the temperature that the policy is trained at."""
    with without_adapter(reference.model):
        return [_with_logprobs(batch, reference, loss, temperature) for batch in batches]


def _with_logprobs(batch: Batch, reference: Policy, loss: LossConfig, temperature: float) -> Batch:
    result = linear_logprobs(
        hidden_states(reference, batch),
        reference.head_VD,
        batch.rows_N,
        batch.targets_N,
        temperature=temperature,
        softcap=reference.softcap,
        impl=loss.impl,
    )
    return replace(batch, ref_logprobs_N=result.logprobs)
