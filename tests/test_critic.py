"""The critic on packed rows: its values, the gradient of its loss, and its state."""

from __future__ import annotations

import random
from dataclasses import replace

import by_hand
import pytest
import torch

from turnfast.config.schema import CriticConfig, LossConfig, OptimConfig
from turnfast.credit import assign_credits
from turnfast.model import Policy, hidden_states
from turnfast.packing.options import PackOptions
from turnfast.packing.pack import pack
from turnfast.rundir.checkpoint import (
    CheckpointError,
    TrainingState,
    load_checkpoint,
    save_checkpoint,
)
from turnfast.types import Group, Trajectory
from turnfast.update.critic import Critic
from turnfast.update.learner import Learner
from turnfast.update.optimizer import Optimizer
from turnfast.update.update import update

OPTIM = OptimConfig(lr=1e-3, warmup_steps=0, grad_clip=1e9)


def make_groups(seed: int) -> list[Group]:
    """Ragged groups with a failed rollout, a turn without tokens and restarts."""
    draw = random.Random(seed)

    def ids(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, 280) for _ in range(draw.randrange(least, most)))

    groups = []
    for name in "ab":
        prompt, rollouts = ids(5, 9), []
        for index in range(3):
            turns = []
            for k in range(draw.randrange(1, 4)):
                sampled = ids(0 if k == 1 else 1, 6)
                turns.append(
                    by_hand.turn(
                        prompt_ids=prompt if k == 0 else ids(1, 5),
                        sampled_ids=sampled,
                        logprobs=tuple(-draw.uniform(3.0, 8.0) for _ in sampled),
                        reward=draw.random(),
                        restart=k > 0 and draw.random() < 0.3,
                    )
                )
            status = "error" if (name, index) == ("a", 1) else "finished"
            rollouts.append(by_hand.rollout(index, turns, status, outcome=draw.random()))
        groups.append(by_hand.group_of(*rollouts))
    return groups


def random_critic(policy: Policy, config: CriticConfig | None = None, seed: int = 0) -> Critic:
    """A critic whose layer is not zero."""
    critic = Critic(policy, config or CriticConfig(), OPTIM)
    torch.manual_seed(seed)
    state = critic.state_dict()
    state["head.weight"] = torch.randn_like(state["head.weight"])
    state["head.bias"] = torch.randn_like(state["head.bias"])
    critic.load_state_dict(state)
    return critic


def plain_values(policy: Policy, critic: Critic, trajectory: Trajectory) -> list[torch.Tensor]:
    """The critic on the model's hidden states, one context at a time."""
    weight, bias = critic.head.weight, critic.head.bias
    ids: list[int] = []
    values: list[torch.Tensor] = []
    for turn in trajectory.turns:
        if turn.restart:
            ids = []
        ids += turn.prompt_ids
        for token in turn.sampled_ids:
            hidden = policy.model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
            values.append(hidden.float() @ weight[0] + bias[0])
            ids.append(token)
    return values


@pytest.mark.parametrize("budget", [32, 4096])
@pytest.mark.parametrize("share_prefixes", [False, True])
def test_values_match_single_contexts(policy, budget, share_prefixes):
    groups, critic = make_groups(1), random_critic(policy)
    values = critic.values(
        policy, groups, tokens_per_microbatch=budget, share_prefixes=share_prefixes
    )
    assert [len(row) for row in values] == [3, 3]
    for group, rows in zip(groups, values, strict=True):
        for trajectory, row in zip(group.trajectories, rows, strict=True):
            with torch.no_grad():
                expected = plain_values(policy, critic, trajectory)
            wanted = () if trajectory.left_out else tuple(map(float, expected))
            assert row == pytest.approx(wanted, abs=2e-5)


def test_a_new_critic_returns_zeros(policy):
    values = Critic(policy, CriticConfig(), OPTIM).values(
        policy, make_groups(1), tokens_per_microbatch=64, share_prefixes=True
    )
    assert {v for rows in values for row in rows for v in row} == {0.0}


@pytest.mark.parametrize("rule", ["mt_ppo", "turn_ppo"])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_the_gradient_matches_plain_autograd(policy, rule, clip):
    groups = make_groups(2)
    critic = random_critic(policy, CriticConfig(clip=clip, coef=0.7))
    values = critic.values(policy, groups, tokens_per_microbatch=4096, share_prefixes=True)
    shifted = [[tuple(v + 0.1 * (-1) ** i for i, v in enumerate(r)) for r in g] for g in values]
    credits = assign_credits(groups, rule, values=shifted)
    gradients = []
    for budget, share in ((4096, True), (32, False)):
        policy.model.zero_grad()
        critic.zero_grad()
        packed = pack(groups, credits, budget=budget, options=PackOptions(share_prefixes=share))
        losses = [critic.loss(hidden_states(policy, b), b) for b in packed.batches]
        sum(losses).backward()
        gradients.append(_gradients(policy, critic))

    policy.model.zero_grad()
    critic.zero_grad()
    errors = []
    for group, credit in zip(groups, credits, strict=True):
        for trajectory, tokens in zip(group.trajectories, credit.tokens, strict=True):
            if trajectory.left_out:
                continue
            now = plain_values(policy, critic, trajectory)
            for v, old, target in zip(now, tokens.values, tokens.targets, strict=True):
                if target is None:
                    continue
                error = (v - target) ** 2
                if clip is not None:
                    clipped = old + (v - old).clamp(-clip, clip)
                    error = torch.maximum(error, (clipped - target) ** 2)
                errors.append(error)
    loss = 0.5 * 0.7 * torch.stack(errors).mean()
    loss.backward()
    assert float(sum(losses).detach()) == pytest.approx(float(loss.detach()), rel=1e-5)
    truth = _gradients(policy, critic)
    assert float(truth[-1].abs().max()) > 1e-3
    for found in gradients:
        for ours, theirs in zip(found, truth, strict=True):
            # the rounding error is relative to the largest entries
            assert (ours - theirs).abs().max() <= 2e-6 * max(1.0, float(theirs.abs().max()))


def _gradients(policy: Policy, critic: Critic) -> list[torch.Tensor]:
    every = (*policy.model.parameters(), *critic.head.parameters())
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in every]


@pytest.mark.parametrize("rule", ["mt_ppo", "turn_ppo"])
def test_updates_reduce_the_value_loss(policy, rule):
    groups = make_groups(3)
    critic = Critic(policy, CriticConfig(clip=None), OPTIM)
    optimizer = Optimizer(policy.model.parameters(), OPTIM)
    values = critic.values(policy, groups, tokens_per_microbatch=64, share_prefixes=True)
    credits = assign_credits(groups, rule, values=values)
    packed = pack(groups, credits, budget=64)
    sampled = sum(t.num_sampled for g in groups for t in g.trajectories if not t.left_out)
    assert packed.num_targets == sampled
    losses = [
        update(
            Learner(policy=policy, optimizer=optimizer, critic=critic), packed.batches, LossConfig()
        ).value_loss
        for _ in range(25)
    ]
    assert losses[-1] < 0.2 * losses[0]


def test_a_batch_has_the_token_advantages_of_mt_ppo(policy):
    groups, critic = make_groups(4), random_critic(policy)
    values = critic.values(policy, groups, tokens_per_microbatch=4096, share_prefixes=True)
    credits = assign_credits(groups, "mt_ppo", values=values)
    options = PackOptions(share_prefixes=False)
    (batch,) = pack(groups, credits, budget=4096, options=options).batches
    expected = [
        a for credit in credits for tokens in credit.tokens for a in tokens.advantages or ()
    ]
    got = batch.advantages_K[batch.turns_N.long()].tolist()
    assert sorted(got) == pytest.approx(sorted(expected), rel=1e-6)
    assert float(batch.value_weights_N.sum()) == pytest.approx(1.0)


def test_a_checkpoint_restores_the_critic(policy, tmp_path):
    groups, critic = make_groups(5), random_critic(policy)
    optimizer = Optimizer(policy.model.parameters(), OPTIM)

    def step(critic: Critic) -> None:
        values = critic.values(policy, groups, tokens_per_microbatch=64, share_prefixes=True)
        credits = assign_credits(groups, "mt_ppo", values=values)
        update(
            Learner(policy=policy, optimizer=optimizer, critic=critic),
            pack(groups, credits, budget=64).batches,
            LossConfig(),
        )

    step(critic)
    training = TrainingState(model=policy.model, optimizer=optimizer, critic=critic)
    path = save_checkpoint(tmp_path, 1, training, progress={}, keep=1)
    step(critic)
    there = critic.state_dict()
    fresh = Critic(policy, CriticConfig(), OPTIM)
    load_checkpoint(path, replace(training, critic=fresh))
    step(fresh)
    again = fresh.state_dict()
    assert again.keys() == there.keys() and len(again) == 9
    assert all(torch.equal(a, there[name]) for name, a in again.items())


def test_a_checkpoint_without_a_critic_is_refused(policy, tmp_path):
    optimizer = Optimizer(policy.model.parameters(), OPTIM)
    training = TrainingState(model=policy.model, optimizer=optimizer)
    path = save_checkpoint(tmp_path, 1, training, progress={}, keep=1)
    with pytest.raises(CheckpointError, match=r"no matching critic.*credit and model sections"):
        load_checkpoint(path, replace(training, critic=Critic(policy, CriticConfig(), OPTIM)))
