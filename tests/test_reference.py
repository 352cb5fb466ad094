"""The KL term against a frozen reference: its value, its gradient and its effect."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from step_data import RecordingOptimizer, make_groups, optimizer_of
from test_update import plain_logprobs

from turnfast.config.recipe import build_config
from turnfast.config.schema import LossConfig, ModelConfig
from turnfast.credit import assign_credits
from turnfast.errors import ConfigError
from turnfast.model import Policy
from turnfast.model.tiny import write_tiny_model
from turnfast.packing.pack import pack
from turnfast.update.learner import Learner
from turnfast.update.reference import open_reference, with_reference
from turnfast.update.update import update

TEMPERATURE = 0.8
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
    found = torch.cat([batch.ref_logprobs_N for batch in batches])
    with torch.no_grad():
        wanted = [plain_logprobs(policy.model, t, softcap=2.0) for t in trajectories]
    torch.testing.assert_close(found.sort().values, torch.cat(wanted).sort().values)


@pytest.mark.parametrize("budget", [48, 4096])
def test_value_and_gradient_match_k3(policy, budget):
    reference = open_reference(KL, ModelConfig(), policy)
    assert reference is not None and not any(p.requires_grad for p in reference.model.parameters())
    perturb(policy)
    batches, trajectories = step_of(policy, reference, budget)
    gradients, kls = [], []
    for config in (KL, LossConfig()):
        optimizer: RecordingOptimizer = optimizer_of(policy, lr=1e-12)
        plain = [replace(b, ref_logprobs_N=None) for b in batches]
        done = update(
            Learner(policy=policy, optimizer=optimizer),
            batches if config is KL else plain,
            config,
            temperature=TEMPERATURE,
        )
        gradients.append(optimizer.gradients[0])
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
    strong = LossConfig(kl_coef=50.0)
    optimizer = optimizer_of(policy, lr=1e-2)
    kls = [
        update(
            Learner(policy=policy, optimizer=optimizer), batches, strong, temperature=TEMPERATURE
        ).kl.value
        for _ in range(15)
    ]
    assert kls[-1] is not None and kls[0] is not None and kls[-1] < 0.3 * kls[0]


def test_another_model_can_be_the_reference(policy, tmp_path):
    folder = tmp_path / "other"
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    there = LossConfig(kl_coef=0.1, reference=str(folder))
    reference = open_reference(there, ModelConfig(), policy)
    assert reference is not None and reference.folder == folder
    with pytest.raises(ConfigError, match=r"loss\.reference: no folder"):
        open_reference(there.model_copy(update={"reference": "/no/such"}), ModelConfig(), policy)
    write_tiny_model(tmp_path / "vocabulary", ["a b c"] * 9, seed=0, vocab_size=290, layers=1)
    foreign = there.model_copy(update={"reference": str(tmp_path / "vocabulary")})
    with pytest.raises(ConfigError, match=r"loss\.reference: .* has a vocabulary of"):
        open_reference(foreign, ModelConfig(), policy)


def test_a_reference_without_a_kl_term_is_refused():
    with pytest.raises(ConfigError, match=r"loss\.reference: 'other' is never looked at"):
        build_config({"loss": {"reference": "other"}})
