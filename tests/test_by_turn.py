"""Means of token values by turn index."""

from __future__ import annotations

import math

import pytest
import torch
from step_data import make_groups

from turnfast.credit import assign_credits
from turnfast.metrics.reduce import values_of
from turnfast.packing.options import PackOptions
from turnfast.packing.pack import pack
from turnfast.update.by_turn import by_turn, drawn_kl


@pytest.mark.parametrize("rule", ["mt_grpo", "mt_ppo"])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("share_prefixes", [False, True])
def test_means_match_the_turns(ragged, share_prefixes, rule):
    groups = make_groups(1, ragged=ragged)
    # mt_ppo has one advantage per token, so that a batch has several entries per turn
    values = [[[0.0] * t.num_sampled for t in group.trajectories] for group in groups]
    credits = assign_credits(groups, rule, values=values)
    options = PackOptions(share_prefixes=share_prefixes)
    packed = pack(groups, credits, budget=32, options=options)
    assert len(packed.batches) > 1
    means = by_turn("x", [batch.sampler_logprobs_N for batch in packed.batches], packed.batches)
    expected: dict[str, list[float]] = {}
    for trajectory in (t for group in groups for t in group.trajectories if not t.left_out):
        for k, turn in enumerate(trajectory.turns, 1):
            expected.setdefault(f"x/turn_{k}", []).extend(turn.logprobs)
    wanted = {name: sum(x) / len(x) for name, x in expected.items() if x}
    assert values_of(means) == pytest.approx(wanted)


def test_tokens_that_were_not_computed_do_not_count():
    groups = make_groups(2)
    (batch,) = pack(groups, assign_credits(groups), budget=999).batches
    values = torch.ones(len(batch.targets_N))
    values[0] = math.nan
    assert set(values_of(by_turn("x", [values], [batch])).values()) == {1.0}
    first = batch.places_K[batch.turns_N.long()] == 0
    values[first] = math.nan
    assert "x/turn_1" not in by_turn("x", [values], [batch])
    assert by_turn("x", [values * math.nan], [batch]) == {} == by_turn("x", [], [])


def test_the_kl_estimate_is_unbiased():
    p, q = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([0.4, 0.4, 0.2])
    estimate = (p * drawn_kl(p.log(), q.log())).sum()
    assert estimate == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)
    assert (drawn_kl(p.log(), q.log()) >= 0).all() and not drawn_kl(p.log(), p.log()).any()
