"""What is packed is what was sampled, and no cut of a step changes its gradient."""

from __future__ import annotations

import random

import pytest
import torch
from families import SMALL, policy_of
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3Config
from turnfast.kernels import turn_policy_loss

from turnfast.model import Policy, hidden_states
from turnfast.packing import pack
from turnfast.rows import rows_of
from turnfast.types import Batch, Credit, Group, Task, Trajectory, Turn

VOCAB = 61


@pytest.fixture(scope="module")
def policy() -> Policy:
    return policy_of(Qwen3Config(**{**SMALL, "vocab_size": VOCAB}))


def turn(prompt, sampled, *, restart=False) -> Turn:
    return Turn(
        prompt_ids=tuple(prompt),
        sampled_ids=tuple(sampled),
        logprobs=tuple(-0.5 - 0.01 * i for i in range(len(sampled))),
        text="",
        finish="stop",
        restart=restart,
    )


def trajectory(task, index, turns, status="finished") -> Trajectory:
    return Trajectory(task_id=task, index=index, turns=tuple(turns), status=status)


def group_of(task: str, rollouts, statuses=None) -> Group:
    statuses = statuses or ["finished"] * len(rollouts)
    return Group(
        task=Task(id=task, question=""),
        trajectories=tuple(
            trajectory(task, i, turns, status)
            for i, (turns, status) in enumerate(zip(rollouts, statuses, strict=True))
        ),
    )


def random_step(seed: int, groups: int = 3, size: int = 4) -> tuple[list[Group], list[Credit]]:
    """Groups with a common system prompt, a prompt each, and turns that repeat each other."""
    draw = random.Random(seed)
    ids = lambda n: [draw.randrange(VOCAB) for _ in range(n)]
    system, made, credits = ids(9), [], []
    for g in range(groups):
        prompt, phrases = system + ids(draw.randrange(1, 6)), [ids(5), ids(5)]
        rollouts, advantages = [], []
        for _ in range(size):
            turns = []
            for k in range(draw.randrange(1, 4)):
                sampled = draw.choice(phrases)[: draw.randrange(6)] + ids(draw.randrange(4))
                restart = k > 0 and draw.random() < 0.15
                reply = prompt + ids(3) if restart else draw.choice([[7, 7, 7], ids(3)])
                turns.append(turn(prompt if k == 0 else reply, sampled, restart=restart))
            rollouts.append(turns)
            advantages.append(tuple(draw.choice([0.0, 0.0, 1.0, -0.7, 1.3]) for _ in turns))
        made.append(group_of(f"task{g}", rollouts))
        credits.append(Credit(rule="test", advantages=tuple(advantages)))
    return made, credits


def step_gradient(policy: Policy, batches: tuple[Batch, ...]) -> tuple[float, torch.Tensor]:
    policy.model.zero_grad()
    loss = 0.0
    for batch in batches:
        result = turn_policy_loss(
            hidden_states(policy, batch),
            policy.head_VD,
            batch.rows_N,
            batch.targets_N,
            batch.turns_N,
            batch.advantages_K,
            weights=batch.weights_N,
            impl="reference",
        )
        result.loss.backward()
        loss += float(result.loss.detach())
    return loss, torch.cat([p.grad.flatten() for p in policy.model.parameters()])


def one_at_a_time(policy: Policy, groups, credits, weight_of) -> tuple[float, torch.Tensor]:
    """The specification: transformers' own forward on each context, log-softmax, autograd."""
    policy.model.zero_grad()
    total = torch.zeros(())
    for group, credit in zip(groups, credits, strict=True):
        for i, (played, advantages) in enumerate(
            zip(group.trajectories, credit.advantages, strict=True)
        ):
            context: list[int] = []
            for k, one in enumerate(played.turns):
                context = [*([] if one.restart else context), *one.prompt_ids]
                begin, context = len(context), [*context, *one.sampled_ids]
                if not one.sampled_ids:
                    continue
                logits = policy.model(torch.tensor([context])).logits[0, begin - 1 : -1]
                logprobs = logits.log_softmax(-1).gather(1, torch.tensor(context[begin:])[:, None])
                weight = weight_of(group.task.id, i)
                # on policy: the ratio is 1 and its gradient that of the log-prob
                ratio = (logprobs - logprobs.detach()).exp()
                total = total - weight * advantages[k] * ratio.sum()
    total.backward()
    return float(total.detach()), torch.cat([p.grad.flatten() for p in policy.model.parameters()])


def assert_same(a: tuple[float, torch.Tensor], b: tuple[float, torch.Tensor], budget=1e-6) -> None:
    assert abs(a[0] - b[0]) < budget
    assert (a[1] - b[1]).abs().max() < budget


@pytest.mark.parametrize("normalizer", ["token", "sequence", "constant"])
def test_gradient_is_that_of_one_sequence_at_a_time(policy, normalizer):
    groups, credits = random_step(1)
    trained = [
        t for g, c in zip(groups, credits, strict=True) if c.has_signal for t in g.trajectories
    ]
    counts = [t.num_sampled for t in trained if t.num_sampled]
    lengths = {(t.task_id, t.index): t.num_sampled for t in trained}

    def weight_of(task: str, index: int) -> float:
        if (task, index) not in lengths:
            return 0.0
        return {
            "token": 1 / sum(counts),
            "sequence": 1 / (len(counts) * lengths[task, index]),
            "constant": 1 / (len(counts) * 32.0),
        }[normalizer]

    expected = one_at_a_time(policy, groups, credits, weight_of)
    packed = pack(groups, credits, budget=100, normalizer=normalizer, constant=32.0)
    assert len(packed.batches) > 1
    assert_same(step_gradient(policy, packed.batches), expected)


def test_the_budget_does_not_change_the_gradient(policy):
    groups, credits = random_step(2)
    whole = step_gradient(policy, pack(groups, credits, budget=10_000).batches)
    assert whole[1].abs().max() > 1e-4
    for budget in (64, 90, 131, 400):
        packed = pack(groups, credits, budget=budget)
        assert all(len(batch.tokens_T) <= budget for batch in packed.batches)
        assert_same(step_gradient(policy, packed.batches), whole)


def test_the_weights_of_a_step_are_its_normaliser():
    groups, credits = random_step(3)
    played = [t for g in groups for t in g.trajectories]

    def total(name: str, constant: float = 1.0) -> float:
        packed = pack(groups, credits, budget=80, normalizer=name, constant=constant)
        return float(sum(batch.weights_N.sum() for batch in packed.batches))

    assert total("token") == pytest.approx(1.0, abs=1e-6)
    assert total("sequence") == pytest.approx(1.0, abs=1e-6)
    speaking = [t for t in played if t.num_sampled]
    mean_length = sum(t.num_sampled for t in speaking) / len(speaking)
    assert total("constant", 50.0) == pytest.approx(mean_length / 50.0, abs=1e-6)
    with pytest.raises(ValueError, match="normalizer"):
        total("mean")


def test_groups_without_signal_and_failed_rollouts_are_left_out_of_the_denominator():
    groups, credits = random_step(4, groups=2)
    silent = Credit(rule="test", advantages=tuple((0.0,) * len(r) for r in credits[1].advantages))
    loud = groups[0]
    failed = Group(
        task=loud.task,
        trajectories=(
            *loud.trajectories,
            trajectory(loud.task.id, 9, [turn([1, 2], [3] * 20)], status="error"),
        ),
    )
    with_failed = Credit(rule="test", advantages=(*credits[0].advantages, (5.0,)))
    packed = pack([failed, groups[1]], [with_failed, silent], budget=1000)
    alone = pack([loud], [credits[0]], budget=1000)
    assert packed.zero_signal_groups == 1 and alone.zero_signal_groups == 0
    assert packed.num_targets == alone.num_targets == sum(t.num_sampled for t in loud.trajectories)
    (a,), (b,) = packed.batches, alone.batches
    for name in ("tokens_T", "positions_T", "rows_N", "targets_N", "turns_N", "weights_N"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_nothing_to_train_is_no_batch():
    groups, _ = random_step(5, groups=1)
    silent = [
        Credit(rule="t", advantages=tuple((0.0,) * len(t.turns) for t in groups[0].trajectories))
    ]
    packed = pack(groups, silent, budget=100)
    assert packed.batches == () and packed.num_tokens == 0 and packed.zero_signal_groups == 1
    assert pack([], [], budget=100).batches == ()


def test_every_sampled_token_is_a_target_once_in_order():
    groups, credits = random_step(6)
    packed = pack(groups, credits, budget=120)
    expected = sorted(
        (played.turns[k].sampled_ids, a)
        for group, credit in zip(groups, credits, strict=True)
        for played, advantages in zip(group.trajectories, credit.advantages, strict=True)
        for k, a in enumerate(advantages)
        if credit.has_signal and played.turns[k].sampled_ids
    )
    found = []
    for batch in packed.batches:
        kept, counts = batch.turns_N.unique_consecutive(return_counts=True)
        assert len(kept.unique()) == len(kept), "the tokens of a turn are contiguous"
        for k, ids in zip(kept, batch.targets_N.split(counts.tolist()), strict=True):
            found.append((tuple(ids.tolist()), round(float(batch.advantages_K[k]), 6)))
    assert sorted(found) == expected
    assert packed.num_targets == sum(len(ids) for ids, _ in expected)


def test_a_row_longer_than_the_budget_is_refused_with_the_way_out():
    group = group_of("t", [[turn(range(30), [1, 2])], [turn(range(30), [3])]])
    credit = Credit(rule="t", advantages=((1.0,), (-1.0,)))
    assert pack([group], [credit], budget=31).num_targets == 3
    with pytest.raises(ValueError, match=r"31 tokens.*train\.tokens_per_microbatch.*30"):
        pack([group], [credit], budget=30)


def test_a_turn_without_tokens_keeps_its_place():
    turns = [turn([1, 2, 3], []), turn([4], [5, 6])]
    (row,) = rows_of(turns, [0.5, -0.5], 0)
    assert row.tokens == [1, 2, 3, 4, 5] and row.rows == [3, 4] and row.targets == [5, 6]
    assert row.turns == [1, 1] and row.advantages == [0.5, -0.5]
    assert rows_of([turn([1], [])], [1.0], 0) == []


def test_a_restart_starts_a_row():
    turns = [turn([1, 2], [3, 4]), turn([1, 9], [8], restart=True), turn([7], [6])]
    first, second = rows_of(turns, [1.0, 2.0, 3.0], 5)
    assert first.tokens == [1, 2, 3] and first.targets == [3, 4] and first.advantages == [1.0]
    assert second.tokens == [1, 9, 8, 7] and second.rows == [1, 3] and second.turns == [0, 1]
    assert {first.trajectory, second.trajectory} == {5}


def test_a_turn_without_context_is_refused():
    with pytest.raises(ValueError, match="no prompt"):
        rows_of([turn([], [1])], [1.0], 0)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    budget=st.sampled_from([70, 110, 10_000]),
    normalizer=st.sampled_from(["token", "sequence", "constant"]),
)
def test_sharing_prefixes_and_dropping_idle_ends_change_nothing(policy, seed, budget, normalizer):
    groups, credits = random_step(seed)
    options = {"normalizer": normalizer, "constant": 20.0}
    plain = pack(groups, credits, budget=10_000, share_prefixes=False, **options)
    shared = pack(groups, credits, budget=budget, **options)
    lean = pack(groups, credits, budget=budget, drop_idle=True, **options)
    assert plain.shared_prefix == 0.0 and plain.num_tokens == plain.num_tokens_total
    assert shared.num_tokens_total == plain.num_tokens and shared.num_targets == plain.num_targets
    assert lean.num_tokens_total + lean.num_idle_tokens == plain.num_tokens
    if not plain.batches:
        return
    expected = step_gradient(policy, plain.batches)
    assert_same(step_gradient(policy, shared.batches), expected, 1e-5)
    assert_same(step_gradient(policy, lean.batches), expected, 1e-5)


def test_computed_tokens_are_the_distinct_ones():
    groups, credits = random_step(11)
    contexts = set()
    for group, credit in zip(groups, credits, strict=True):
        for i, (played, advantages) in enumerate(
            zip(group.trajectories, credit.advantages, strict=True)
        ):
            for row in rows_of(played.turns, advantages, i) if credit.has_signal else []:
                contexts |= {tuple(row.tokens[: n + 1]) for n in range(len(row.tokens))}
    packed = pack(groups, credits, budget=10_000)
    assert packed.num_tokens == len(contexts) < packed.num_tokens_total
    assert packed.shared_prefix == 1 - packed.num_tokens / packed.num_tokens_total
    cut = pack(groups, credits, budget=90)
    assert len(contexts) < cut.num_tokens < packed.num_tokens_total
    assert max(len(batch.tokens_T) for batch in cut.batches) <= 90


def test_an_idle_rollout_costs_nothing_but_its_place_in_the_denominator():
    turns = [turn([1, 2, 3], [4, 5]), turn([6], [7, 8, 9])]
    other = [turn([1, 2, 3], [4, 9]), turn([6], [7, 8, 9])]
    group = group_of("t", [turns, other])
    credit = Credit(rule="t", advantages=((1.0, 0.0), (0.0, 0.0)))
    packed = pack([group], [credit], budget=100, drop_idle=True)
    (batch,) = packed.batches
    assert batch.tokens_T.tolist() == [1, 2, 3, 4] and batch.targets_N.tolist() == [4, 5]
    assert batch.weights_N.tolist() == pytest.approx([0.1, 0.1])
    assert packed.num_idle_tokens == 4 + 8 and packed.num_tokens_total == 4
