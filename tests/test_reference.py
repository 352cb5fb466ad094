"""The KL term against a frozen reference: its value, its gradient and its effect."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from step_data import learner_of, make_groups
from test_update import TEMPERATURE, plain_logprobs

from turnfast.config.schema import LossConfig, ModelConfig
from turnfast.credit import assign_credits
from turnfast.errors import ConfigError
from turnfast.model import Policy
from turnfast.model.tiny import write_tiny_model
from turnfast.packing.pack import pack
from turnfast.update.reference import open_reference, with_reference
from turnfast.update.update import update

KL = LossConfig(kl_coef=0.3)


def perturb(policy: Policy, seed: int = 0) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


def step_of(policy: Policy, reference: Policy, budget: int = 4096, seed: int = 1):
    groups = make_groups(seed)
    packed = pack(groups, assign_credits(groups), budget=budget)
    batches = with_reference(packed.batches, reference, KL, temperature=TEMPERATURE)
    return batches, [t for group in groups for t in group.trajectories]


def test_without_a_kl_term_there_is_no_reference(policy):
    assert open_reference(LossConfig(), ModelConfig(), policy) is None


def test_the_reference_uses_its_own_soft_cap(policy):
    batches, trajectories = step_of(policy, replace(policy, softcap=2.0))
    logprobs = torch.cat([batch.ref_logprobs_N for batch in batches])
    with torch.no_grad():
        expected = [plain_logprobs(policy.model, t, softcap=2.0) for t in trajectories]
    torch.testing.assert_close(logprobs.sort().values, torch.cat(expected).sort().values)


@pytest.mark.parametrize("budget", [48, 4096])
def test_value_and_gradient_match_k3(policy, budget):
    reference = open_reference(KL, ModelConfig(), policy)
    assert reference is not None and not any(p.requires_grad for p in reference.model.parameters())
    perturb(policy)
    batches, trajectories = step_of(policy, reference, budget)
    gradients, kls = [], []
    without_reference = [replace(batch, ref_logprobs_N=None) for batch in batches]
    for config, each in ((KL, batches), (LossConfig(), without_reference)):
        learner = learner_of(policy, lr=1e-12)
        done = update(learner, each, config, temperature=TEMPERATURE)
        gradients.append(learner.optimizer.gradients[0])
        kls.append(done.kl and done.kl.value)

    policy.model.zero_grad()
    gaps = []
    for trajectory in trajectories:
        with torch.no_grad():
            there = plain_logprobs(reference.model, trajectory)
        gaps.append(there - plain_logprobs(policy.model, trajectory))
    gap = torch.cat(gaps)
    k3 = (gap.exp() - gap - 1).mean()
    (0.3 * k3).backward()
    assert kls == [pytest.approx(float(k3.detach()), rel=1e-4), None]
    for parameter, with_kl, without in zip(policy.model.parameters(), *gradients, strict=True):
        if parameter.grad is not None:
            assert torch.allclose(with_kl - without, parameter.grad, atol=2e-6, rtol=1e-3)


def test_the_kl_term_moves_the_policy_to_the_reference(policy):
    reference = open_reference(KL, ModelConfig(), policy)
    assert reference is not None
    perturb(policy)
    batches, _ = step_of(policy, reference)
    strong, learner = LossConfig(kl_coef=50.0), learner_of(policy, lr=1e-2)
    kls = [update(learner, batches, strong, temperature=TEMPERATURE).kl.value for _ in range(15)]
    assert kls[-1] < 0.3 * kls[0]


def test_another_model_can_be_the_reference(policy, tmp_path):
    folder = tmp_path / "other"
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)

    def reference_from(folder: Path) -> Policy | None:
        loss = LossConfig(kl_coef=0.1, reference=str(folder))
        return open_reference(loss, ModelConfig(), policy)

    reference = reference_from(folder)
    assert reference is not None and reference.folder == folder
    with pytest.raises(ConfigError, match=r"loss\.reference: no folder"):
        reference_from(tmp_path / "missing")
    write_tiny_model(tmp_path / "vocabulary", ["a b c"] * 9, seed=0, vocab_size=290, layers=1)
    with pytest.raises(ConfigError, match=r"loss\.reference: .* has a vocabulary of"):
        reference_from(tmp_path / "vocabulary")
