"""Updates against plain autograd on one sequence at a time."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby

import pytest
import torch
from families import SMALL, policy_of
from step_data import RecordingOptimizer, adamw_gradients, learner_of, make_groups, set_weights
from transformers import Qwen2Config

from turnfast.config.schema import LossConfig, OptimConfig
from turnfast.credit import assign_credits
from turnfast.errors import TrainingError
from turnfast.model import hidden_states
from turnfast.packing.options import PackOptions
from turnfast.packing.pack import Packed, pack
from turnfast.types import Trajectory
from turnfast.update.learner import Learner
from turnfast.update.optimizer import Optimizer
from turnfast.update.update import Update, needs_every_token, update

TEMPERATURE = 0.8
LOSS = LossConfig()


def packed_step(
    seed: int, budget: int = 48, normalizer: str = "token"
) -> tuple[Packed, list[tuple[Trajectory, tuple[float, ...]]]]:
    """Packed rollouts, and each trajectory with its advantages."""
    groups = make_groups(seed)
    credits = assign_credits(groups, "mt_grpo")
    sequences = [
        (trajectory, advantages)
        for group, credit in zip(groups, credits, strict=True)
        for trajectory, advantages in zip(group.trajectories, credit.advantages, strict=True)
    ]
    options = PackOptions(normalizer=normalizer)
    return pack(groups, credits, budget=budget, options=options), sequences


def turns_of_tokens(trajectory: Trajectory) -> list[int]:
    """The turn of every sampled token."""
    return [k for k, turn in enumerate(trajectory.turns) for _ in turn.sampled_ids]


def sampler_logprobs(trajectory: Trajectory) -> torch.Tensor:
    return torch.tensor([x for turn in trajectory.turns for x in turn.logprobs])


def plain_logprobs(model, trajectory: Trajectory, softcap: float | None = None) -> torch.Tensor:
    """Log-probs of the sampled ids, from the model's own forward pass on this sequence."""
    ids: list[int] = []
    positions: list[int] = []
    for turn in trajectory.turns:
        ids += turn.prompt_ids
        positions += range(len(ids), len(ids) + len(turn.sampled_ids))
        ids += turn.sampled_ids
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logprobs = torch.log_softmax(logits.float() / TEMPERATURE, dim=-1)
    return torch.stack([logprobs[position - 1, ids[position]] for position in positions])


def plain_loss(model, sequences, old, config: LossConfig) -> tuple[torch.Tensor, float]:
    """The loss of the paper, term by term, and the largest ratio."""
    count = sum(trajectory.num_sampled for trajectory, _ in sequences)
    total = torch.zeros(())
    largest = 0.0
    for number, (trajectory, advantages) in enumerate(sequences):
        logprobs = plain_logprobs(model, trajectory)
        before = logprobs.detach() if old is None else old[number]
        gap = logprobs - before
        turns = turns_of_tokens(trajectory)
        if config.ratio == "turn":
            means = {k: gap[[t == k for t in turns]].mean() for k, _ in groupby(turns)}
            gap = torch.stack([means[k] for k in turns])
        if config.ratio == "sequence":
            gap = gap.mean().expand_as(gap)
        ratio = gap.exp()
        advantage = torch.tensor([advantages[k] for k in turns])
        clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        objective = torch.minimum(ratio * advantage, clipped * advantage)
        if config.dual_clip is not None:
            bounded = torch.maximum(objective, config.dual_clip * advantage)
            objective = torch.where(advantage < 0, bounded, objective)
        if config.kind == "cispo":
            objective = ratio.detach().clamp(max=1 + config.clip_high) * advantage * logprobs
        if config.is_cap is not None:
            weight = (before - sampler_logprobs(trajectory)).exp()
            objective = objective * weight.clamp(max=config.is_cap)
        total = total - objective.sum() / count
        largest = max(largest, float(ratio.detach().max()))
    return total, largest


def differences(model, ours) -> float:
    theirs = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


RULES = [
    LOSS,
    LossConfig(ratio="turn"),
    LossConfig(ratio="sequence"),
    LossConfig(is_cap=1.5),
    LossConfig(ratio="turn", is_cap=0.7, clip_low=0.01, clip_high=0.02),
    LossConfig(clip_low=0.05, clip_high=0.05),
    LossConfig(dual_clip=1.001, clip_high=9.0),
    LossConfig(kind="cispo", clip_high=0.001),
]


def name_of(config: LossConfig) -> str:
    changed = config.model_dump(exclude_defaults=True)
    return ",".join(f"{name}={value}" for name, value in changed.items()) or "default"


@pytest.mark.parametrize("config", RULES, ids=name_of)
@pytest.mark.parametrize("budget", [48, 4096])
def test_updates_match_plain_autograd(policy, config, budget):
    """The first update is on policy; its log-probs are the old ones of the second."""
    packed, sequences = packed_step(seed=1, budget=budget)
    assert (len(packed.batches) > 1) == (budget == 48)
    learner = learner_of(policy)
    done = update(learner, packed.batches, config, temperature=TEMPERATURE, num_updates=2)
    assert done.num_updates == 2

    model, optimizer = policy.model, learner.optimizer
    old = None
    for number in range(2):
        set_weights(model, optimizer.weights[number])
        with torch.no_grad():
            old = old or [plain_logprobs(model, trajectory) for trajectory, _ in sequences]
        model.zero_grad()
        loss, largest = plain_loss(model, sequences, old if number else None, config)
        loss.backward()
        assert differences(model, optimizer.gradients[number]) <= 1e-6
        # a tight clip may remove the whole second gradient
        assert number or max(float(g.abs().max()) for g in optimizer.gradients[0]) > 1e-3
    assert done.loss == pytest.approx(float(loss.detach()), abs=1e-5)
    assert done.ratio_max == pytest.approx(largest, rel=1e-4) and done.ratio_max > 1.01

    gap = (torch.cat(old) - torch.cat([sampler_logprobs(t) for t, _ in sequences])).abs()
    assert done.logprob_gap == pytest.approx(float(gap.mean()), rel=1e-4)
    assert done.logprob_gap_max == pytest.approx(float(gap.max()), rel=1e-4)
    assert done.logprob.value == pytest.approx(float(torch.cat(old).mean()), rel=1e-4)


def test_the_loss_uses_the_soft_cap_of_the_model(policy):
    capped = replace(policy, softcap=2.0)
    packed, sequences = packed_step(seed=1)
    learner = learner_of(capped)
    done = update(learner, packed.batches, LOSS, temperature=TEMPERATURE)
    set_weights(policy.model, learner.optimizer.weights[0])
    logprobs = [plain_logprobs(policy.model, t, softcap=2.0) for t, _ in sequences]
    assert done.logprob.value == pytest.approx(float(torch.cat(logprobs).detach().mean()), rel=1e-4)
    objectives = [
        advantages[k] * logprob
        for (trajectory, advantages), values in zip(sequences, logprobs, strict=True)
        for k, logprob in zip(turns_of_tokens(trajectory), values, strict=True)
    ]
    policy.model.zero_grad()
    (-torch.stack(objectives).mean()).backward()
    assert differences(policy.model, learner.optimizer.gradients[0]) <= 1e-6


@pytest.mark.parametrize("ratio", ["token", "turn", "sequence"])
def test_sampler_log_probs_can_be_the_old_ones_of_every_update(policy, ratio):
    config = LossConfig(ratio=ratio, old_logprobs="sampler", max_logprob_gap=100.0)
    packed, sequences = packed_step(seed=1)
    old = [sampler_logprobs(trajectory) for trajectory, _ in sequences]
    learner = learner_of(policy)
    update(learner, packed.batches, config, temperature=TEMPERATURE, num_updates=2)
    optimizer = learner.optimizer
    for weights, gradients in zip(optimizer.weights, optimizer.gradients, strict=True):
        set_weights(policy.model, weights)
        policy.model.zero_grad()
        loss, largest = plain_loss(policy.model, sequences, old, config)
        loss.backward()
        assert largest > 1.1
        assert differences(policy.model, gradients) <= 1e-6
        assert max(float(g.abs().max()) for g in gradients) > 1e-3


def test_log_probs_that_differ_too_much_are_refused(policy):
    packed, _ = packed_step(seed=1)
    learner = learner_of(policy)
    start = [p.detach().clone() for p in policy.model.parameters()]
    strict = LossConfig(old_logprobs="sampler", max_logprob_gap=0.1)
    with pytest.raises(TrainingError, match=r"max_logprob_gap: .*loss\.old_logprobs") as caught:
        update(learner, packed.batches, strict)
    assert learner.optimizer.num_steps == 0
    assert all(p.grad is None for p in policy.model.parameters())
    assert all(map(torch.equal, start, policy.model.parameters()))
    gap = update(learner, packed.batches, LOSS).logprob_gap
    assert f"by {gap:.3g} on average, more than 0.1" in str(caught.value)


def test_the_clip_fraction_is_the_share_of_clipped_tokens(policy):
    config = LossConfig(clip_low=0.1, clip_high=0.2)
    packed, sequences = packed_step(seed=1)
    learner = learner_of(policy, lr=5e-4)
    done = update(learner, packed.batches, config, temperature=TEMPERATURE, num_updates=2)
    logprobs = []
    for weights in learner.optimizer.weights:
        set_weights(policy.model, weights)
        with torch.no_grad():
            logprobs.append(torch.cat([plain_logprobs(policy.model, t) for t, _ in sequences]))
    ratio_N = (logprobs[1] - logprobs[0]).exp()
    advantage_N = torch.tensor(
        [advantages[k] for t, advantages in sequences for k in turns_of_tokens(t)]
    )
    clipped_N = ((ratio_N > 1.2) & (advantage_N > 0)) | ((ratio_N < 0.9) & (advantage_N < 0))
    expected = float(clipped_N.double().mean())
    assert 0.1 < expected < 0.9
    assert done.clip_fraction.value == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LOSS, False),
        (LossConfig(ratio="turn", is_cap=2.0), False),
        (LossConfig(ratio="sequence"), True),
        (LossConfig(entropy_coef=-0.1), True),
        (LossConfig(kl_coef=0.1), True),
    ],
)
def test_only_some_losses_need_tokens_without_advantage(config, expected):
    assert needs_every_token(config) == expected


def test_the_first_update_is_on_policy_and_in_train_mode(policy):
    policy.model.eval()
    packed, _ = packed_step(seed=2)
    done = update(learner_of(policy), packed.batches, LOSS)
    assert done.ratio_max == 1.0 and done.clip_fraction.value == 0.0 and done.lr == 3e-3
    assert all(module.training for module in policy.model.modules())


@pytest.mark.parametrize("normalizer", ["token", "sequence", "constant"])
def test_the_split_into_micro_batches_does_not_change_the_gradient(policy, normalizer):
    start = [p.detach().clone() for p in policy.model.parameters()]
    gradients = []
    for budget in (48, 80, 4096):
        set_weights(policy.model, start)
        learner = learner_of(policy)
        packed, _ = packed_step(seed=3, budget=budget, normalizer=normalizer)
        update(learner, packed.batches, LOSS)
        gradients.append(learner.optimizer.gradients[0])
    for other in gradients[1:]:
        worst = max(float((a - b).abs().max()) for a, b in zip(gradients[0], other, strict=True))
        assert worst <= 1e-6


def test_a_step_without_signal_changes_nothing(policy):
    equal = [
        replace(group, trajectories=tuple(replace(t, outcome=1.0) for t in group.trajectories))
        for group in make_groups(4)
    ]
    packed = pack(equal, assign_credits(equal, "grpo_or"), budget=64)
    assert packed.batches == ()
    start = [p.detach().clone() for p in policy.model.parameters()]
    learner = learner_of(policy)
    done = update(learner, packed.batches, LOSS, num_updates=3)
    assert done == Update() and learner.optimizer.num_steps == 0
    assert all(torch.equal(a, b) for a, b in zip(start, policy.model.parameters(), strict=True))


@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_values_that_are_not_finite_change_no_weight(policy, where):
    packed, _ = packed_step(seed=5)
    learner = learner_of(policy)
    update(learner, packed.batches, LOSS)
    start = [p.detach().clone() for p in policy.model.parameters()]
    if where == "gradient":
        handle = policy.head_VD.register_hook(lambda g: g * float("inf"))
    else:
        handle = policy.model.base_model.norm.register_forward_hook(
            lambda module, args, out: out * float("nan")
        )
    with pytest.raises(TrainingError, match=r"optim\.lr"):
        update(learner, packed.batches, LOSS)
    handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(start, policy.model.parameters(), strict=True))
    assert all(p.grad is None for p in policy.model.parameters())
    assert learner.optimizer.num_steps == 1
    update(learner, packed.batches, LOSS)


class AutogradSum(RecordingOptimizer):
    """Autograd computes and sums the head's gradient of each micro-batch."""

    def grad_sum(self, parameter):
        return None


def step_of(optimizer_class, batches, *, tied: bool, dtype: torch.dtype) -> list[torch.Tensor]:
    """The gradients that AdamW receives."""
    config = Qwen2Config(**{**SMALL, "vocab_size": 300}, tie_word_embeddings=tied, dtype=dtype)
    policy = policy_of(config)
    policy.model.to(dtype)
    optimizer = optimizer_class(policy.model.parameters(), OptimConfig(grad_clip=1e9))
    with adamw_gradients() as steps:
        update(Learner(policy=policy, optimizer=optimizer), batches, LOSS)
    assert len(steps) == 1 and all(p.grad is None for p in policy.model.parameters())
    if dtype == torch.bfloat16:  # no gradient stays in bf16
        assert not any(g.any() for g in getattr(optimizer, "gradients", [[]])[0])
    return steps[0]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_micro_batches_share_one_head_gradient(tied, dtype):
    many, one = (packed_step(seed=1, budget=budget)[0].batches for budget in (32, 4096))
    assert len(many) >= 3 and len(one) == 1
    place = 0 if tied else -1  # of the head among the parameters
    kinds = (RecordingOptimizer, AutogradSum)
    found, expected = (step_of(kind, many, tied=tied, dtype=dtype) for kind in kinds)
    rounded, head_VD = expected.pop(place), found.pop(place)
    assert all(map(torch.equal, found, expected))
    assert rounded.abs().max() > 1e-3
    bound = 1e-6 if dtype == torch.float32 else 4e-3
    assert (head_VD - rounded).norm() <= bound * rounded.norm()
    if dtype == torch.float32:
        whole = step_of(RecordingOptimizer, one, tied=tied, dtype=dtype)
        assert (whole.pop(place) - head_VD).abs().max() <= 1e-6
        for a, b in zip(found, whole, strict=True):
            assert (a - b).abs().max() <= 1e-6


def test_many_small_bf16_micro_batches_are_as_accurate_as_a_large_one():
    """Error against float64."""
    groups = [group for seed in range(40) for group in make_groups(seed)]
    credits = assign_credits(groups, "mt_grpo")
    many, one = (
        pack(groups, credits, budget=budget, options=PackOptions(share_prefixes=False)).batches
        for budget in (32, 1 << 20)
    )
    assert len(many) > 100 and len(one) == 1
    errors = {}
    truth = gradients_of(one, torch.float64)
    for name, batches in (("many", many), ("one", one)):
        found = gradients_of(batches, torch.bfloat16)
        errors[name] = [float((a - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True)]
    for small, large in zip(errors["many"], errors["one"], strict=True):
        assert small <= 1.1 * large + 1e-3
    assert max(errors["one"]) < 0.03


def gradients_of(batches, dtype: torch.dtype) -> list[torch.Tensor]:
    """The gradients that AdamW receives for the layers below the head of a bf16 model."""
    config = Qwen2Config(**{**SMALL, "vocab_size": 300}, tie_word_embeddings=False)
    policy = policy_of(config)
    policy.model.to(torch.bfloat16).to(dtype)
    if dtype == torch.float64:
        policy.model.zero_grad()
        for batch in batches:
            hidden_TD = hidden_states(policy, batch)
            logits_NV = hidden_TD[batch.rows_N] @ policy.head_VD.T
            logprobs_N = logits_NV.log_softmax(-1).gather(1, batch.targets_N[:, None]).squeeze(1)
            objective_N = batch.advantages_K[batch.turns_N.long()].double() * logprobs_N
            (-(batch.weights_N.double() * objective_N).sum()).backward()
        return [p.grad for p in policy.model.base_model.layers.parameters()]
    optimizer = Optimizer(policy.model.parameters(), OptimConfig(grad_clip=1e9))
    with adamw_gradients() as steps:
        update(Learner(policy=policy, optimizer=optimizer), batches, LOSS)
    layers = {id(p) for p in policy.model.base_model.layers.parameters()}
    return [
        gradient.double()
        for parameter, gradient in zip(optimizer.parameters, steps[0], strict=True)
        if id(parameter) in layers
    ]


def test_a_tied_embedding_has_a_sparse_gradient_within_an_update(policy):
    packed, _ = packed_step(seed=1)
    embedding = policy.model.get_input_embeddings()
    assert embedding.weight is policy.head_VD and len(packed.batches) == 2
    seen = []
    handle = policy.head_VD.register_hook(seen.append)
    learner = learner_of(policy)
    update(learner, packed.batches, LOSS)
    handle.remove()
    assert all(g.layout == torch.sparse_coo for g in seen)
    rows = [set(g._indices()[0].tolist()) for g in seen]
    assert rows == [set(batch.tokens_T.tolist()) for batch in packed.batches]
    assert not learner.optimizer.gradients[0][0].is_sparse
    assert not embedding.sparse


def test_the_entropy_bonus_raises_entropy(policy):
    packed, _ = packed_step(seed=6)
    learner, config = learner_of(policy, lr=1e-2), LossConfig(entropy_coef=100.0)
    entropies = [update(learner, packed.batches, config).entropy.value for _ in range(3)]
    assert entropies[2] > entropies[0]
