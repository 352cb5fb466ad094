"""Means of token values by turn index."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import by_hand
import pytest
import torch

from turnfast.credit import assign_credits
from turnfast.metrics.reduce import values_of
from turnfast.packing.options import PackOptions
from turnfast.packing.pack import pack
from turnfast.types import Group, Turn
from turnfast.update.by_turn import by_turn, drawn_kl


def groups_of(seed: int, *, restarts: bool) -> list[Group]:
    draw = random.Random(seed)

    def turn(k: int) -> Turn:
        ids = tuple(draw.randrange(99) for _ in range(draw.randrange(1, 5)))
        return by_hand.turn(
            prompt_ids=(k, 3),
            sampled_ids=ids,
            logprobs=tuple(-draw.random() for _ in ids),
            reward=draw.random(),
            restart=restarts and k > 0 and draw.random() < 0.5,
        )

    rollouts = [
        by_hand.rollout(i, [turn(k) for k in range(draw.randrange(1, 5))], outcome=draw.random())
        for i in range(6)
    ]
    return [by_hand.group_of(*rollouts)]


@pytest.mark.parametrize("rule", ["mt_grpo", "mt_ppo"])
@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.parametrize("share_prefixes", [False, True])
def test_means_match_the_turns(restarts, share_prefixes, rule):
    groups = groups_of(1, restarts=restarts)
    # mt_ppo has one advantage per token, so that a batch has several entries per turn
    values = [[[0.0] * t.num_sampled for t in group.trajectories] for group in groups]
    credits = assign_credits(groups, rule, values=values)
    options = PackOptions(share_prefixes=share_prefixes)
    packed = pack(groups, credits, budget=24, options=options)
    assert len(packed.batches) > 1
    figures = by_turn("x", [batch.sampler_logprobs_N for batch in packed.batches], packed.batches)
    columns: dict[str, list[float]] = {}
    for trajectory in groups[0].trajectories:
        for k, turn in enumerate(trajectory.turns):
            columns.setdefault(f"x/turn_{k + 1}", []).extend(turn.logprobs)
    assert values_of(figures) == pytest.approx({n: sum(x) / len(x) for n, x in columns.items()})


def test_tokens_that_were_not_computed_do_not_count():
    groups = groups_of(2, restarts=False)
    (batch,) = pack(groups, assign_credits(groups), budget=999).batches
    values = torch.ones(len(batch.targets_N))
    values[0] = math.nan
    assert set(values_of(by_turn("x", [values], [batch])).values()) == {1.0}
    first = batch.places_K[batch.turns_N.long()] == 0
    values[first] = math.nan
    assert "x/turn_1" not in by_turn("x", [values], [batch])
    assert by_turn("x", [values * math.nan], [replace(batch)]) == {} == by_turn("x", [], [])


def test_the_kl_estimate_is_unbiased():
    p, q = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([0.4, 0.4, 0.2])
    estimate = (p * drawn_kl(p.log(), q.log())).sum()
    assert estimate == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)
    assert (drawn_kl(p.log(), q.log()) >= 0).all() and not drawn_kl(p.log(), p.log()).any()
