"""The critic on packed rows: its values, the gradient of its loss, and its state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from step_data import make_groups
from torch.overrides import TorchFunctionMode

from turnfast.config.schema import CriticConfig, LossConfig, OptimConfig
from turnfast.credit import assign_credits
from turnfast.errors import CheckpointError, TornStep
from turnfast.model import Policy, hidden_states
from turnfast.packing.options import PackOptions
from turnfast.packing.pack import pack
from turnfast.rundir.checkpoint import TrainingState, load_checkpoint, save_checkpoint
from turnfast.types import Group, Trajectory
from turnfast.update.critic import Critic
from turnfast.update.learner import Learner
from turnfast.update.optimizer import Optimizer
from turnfast.update.update import update

OPTIM = OptimConfig(lr=1e-3, warmup_steps=0, grad_clip=1e9)


def random_critic(policy: Policy, config: CriticConfig | None = None, seed: int = 0) -> Critic:
    """A critic whose layer is not zero."""
    critic = Critic(policy, config or CriticConfig(), OPTIM)
    torch.manual_seed(seed)
    state = critic.state_dict()
    state["head.weight"] = torch.randn_like(state["head.weight"])
    state["head.bias"] = torch.randn_like(state["head.bias"])
    critic.load_state_dict(state)
    return critic


def values_of(critic: Critic, policy: Policy, groups: Sequence[Group]):
    return critic.values(policy, groups, tokens_per_microbatch=64, share_prefixes=True)


def learner_of(policy: Policy, critic: Critic) -> Learner:
    optimizer = Optimizer(policy.model.parameters(), OPTIM)
    return Learner(policy=policy, optimizer=optimizer, critic=critic)


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
    groups, critic = make_groups(1, ragged=True), random_critic(policy)
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
    values = values_of(Critic(policy, CriticConfig(), OPTIM), policy, make_groups(1))
    assert {v for rows in values for row in rows for v in row} == {0.0}


@pytest.mark.parametrize("rule", ["mt_ppo", "turn_ppo"])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_the_gradient_matches_plain_autograd(policy, rule, clip):
    groups = make_groups(2, ragged=True)
    critic = random_critic(policy, CriticConfig(clip=clip, coef=0.7))
    values = values_of(critic, policy, groups)
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
    groups = make_groups(3, ragged=True)
    critic = Critic(policy, CriticConfig(clip=None), OPTIM)
    learner = learner_of(policy, critic)
    credits = assign_credits(groups, rule, values=values_of(critic, policy, groups))
    packed = pack(groups, credits, budget=64)
    sampled = sum(t.num_sampled for g in groups for t in g.trajectories if not t.left_out)
    assert packed.num_targets == sampled
    losses = [update(learner, packed.batches, LossConfig()).value_loss for _ in range(25)]
    assert losses[-1] < 0.2 * losses[0]


class SecondWorkspaceFails(TorchFunctionMode):
    """The policy's optimizer gets its temporary memory, the critic's does not."""

    calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("dtype") is torch.uint8:
            self.calls += 1
            if self.calls == 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return func(*args, **kwargs)


def test_out_of_memory_in_the_critics_step_is_a_torn_step(policy):
    groups, optim = make_groups(3), OPTIM.model_copy(update={"state": "bfloat16"})
    critic = Critic(policy, CriticConfig(), optim)
    optimizer = Optimizer(policy.model.parameters(), optim)
    credits = assign_credits(groups, "mt_ppo", values=values_of(critic, policy, groups))
    batches = pack(groups, credits, budget=4096).batches
    learner = Learner(policy=policy, optimizer=optimizer, critic=critic)
    text = r"in the critic's step, after the policy's: .*--resume.*optim\.state"
    with SecondWorkspaceFails(), pytest.raises(TornStep, match=text):
        update(learner, batches, LossConfig())
    assert optimizer.num_steps == 1 and not critic.head.weight.any()
    assert all(p.grad is None for p in (*policy.model.parameters(), *critic.head.parameters()))


def test_a_batch_has_the_token_advantages_of_mt_ppo(policy):
    groups, critic = make_groups(4, ragged=True), random_critic(policy)
    credits = assign_credits(groups, "mt_ppo", values=values_of(critic, policy, groups))
    options = PackOptions(share_prefixes=False)
    (batch,) = pack(groups, credits, budget=4096, options=options).batches
    expected = [
        a for credit in credits for tokens in credit.tokens for a in tokens.advantages or ()
    ]
    got = batch.advantages_K[batch.turns_N.long()].tolist()
    assert sorted(got) == pytest.approx(sorted(expected), rel=1e-6)
    assert float(batch.value_weights_N.sum()) == pytest.approx(1.0)


def test_a_checkpoint_restores_the_critic(policy, tmp_path):
    groups, critic = make_groups(5, ragged=True), random_critic(policy)
    learner = learner_of(policy, critic)

    def step(learner: Learner) -> None:
        values = values_of(learner.critic, policy, groups)
        credits = assign_credits(groups, "mt_ppo", values=values)
        update(learner, pack(groups, credits, budget=64).batches, LossConfig())

    step(learner)
    training = TrainingState(model=policy.model, optimizer=learner.optimizer, critic=critic)
    path = save_checkpoint(tmp_path, 1, training, progress={}, keep=1)
    step(learner)
    expected = critic.state_dict()
    resumed = Critic(policy, CriticConfig(), OPTIM)
    load_checkpoint(path, replace(training, critic=resumed))
    step(replace(learner, critic=resumed))
    state = resumed.state_dict()
    assert state.keys() == expected.keys() and len(state) == 9
    assert all(torch.equal(x, expected[name]) for name, x in state.items())


def test_a_checkpoint_without_a_critic_is_refused(policy, tmp_path):
    optimizer = Optimizer(policy.model.parameters(), OPTIM)
    training = TrainingState(model=policy.model, optimizer=optimizer)
    path = save_checkpoint(tmp_path, 1, training, progress={}, keep=1)
    with pytest.raises(CheckpointError, match=r"no matching critic.*credit and model sections"):
        load_checkpoint(path, replace(training, critic=Critic(policy, CriticConfig(), OPTIM)))
