"""The expected gradient of every credit rule on a task where a turn has a small price.

    python bench/credit_direction.py [--samples 20000]

The agent either searches, at a price, and then answers, or answers at once. A search changes the
probability of a right answer (outcome 1). The policy has three logits: search, and a right answer
with and without a search. In each case the price and the effect of a search oppose each other:

    worth its price    a search costs 0.01 and raises success from .3 to .5
    not worth it       a search pays 0.01 and lowers success from .5 to .3

The expected gradient sums over all groups of 2 and 3 rollouts, and over sampled groups of 8. The
loss is normalised by a constant, by tokens or by sequences (one token per turn), as in
`loss.normalizer`. Reported are the gradient of the search logit, and the cosine between the
gradient and that of the expected return. The batch spread of `turn_grpo` is its expectation.

"fading" averages the gradients of `turn_grpo` with scale="turn" and scale="group": the middle of a
schedule that starts with the first and ends with the second.

Writes bench/results/credit_direction.json.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from harness.provenance import RESULTS, provenance, write

from turnfast.credit import assign_credits
from turnfast.credit.rules import turn_grpo
from turnfast.types import Group, Status, Task, Trajectory, Turn

Rollout = tuple[bool, bool]
"""(searched, answered correctly)"""
Vector = tuple[float, float, float]
KINDS: tuple[Rollout, ...] = tuple(product((False, True), repeat=2))
SIZES = (2, 3, 8)
NORMALIZERS = ("constant", "token", "sequence")
RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "turn_grpo": ("turn_grpo", {}),
    "turn_grpo, floor 0": ("turn_grpo", {"floor": 0.0}),
    "turn_grpo, floor 0.2": ("turn_grpo", {"floor": 0.2}),
    "turn_grpo, floor 0.5": ("turn_grpo", {"floor": 0.5}),
    "turn_grpo, batch scale": ("turn_grpo", {"scale": "batch"}),
    "turn_grpo, no scale": ("turn_grpo", {"scale": "none"}),
    "turn_grpo, scale per turn": ("turn_grpo", {"scale": "turn"}),
    "mt_grpo": ("mt_grpo", {}),
    "return_to_go": ("return_to_go", {}),
    "hybrid": ("hybrid", {}),
    "gigpo": ("gigpo", {}),
    "tree": ("tree", {}),
    "grpo_mr": ("grpo_mr", {}),
    "grpo_or": ("grpo_or", {}),
    "rloo": ("rloo", {}),
    "dr": ("dr", {}),
}
TASK = Task(id="q", question="")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A policy and its rewards; `right` and `right_at_once` are probabilities of success."""

    search: float
    right: float
    right_at_once: float
    reward: float

    def probability(self, rollout: Rollout) -> float:
        searched, right = rollout
        success = self.right if searched else self.right_at_once
        return (self.search if searched else 1 - self.search) * (success if right else 1 - success)

    def scores(self, rollout: Rollout) -> list[Vector]:
        """d log pi / d logits of every token of a rollout."""
        searched, right = rollout
        success = self.right if searched else self.right_at_once
        answer = right - success
        if searched:
            return [(1 - self.search, 0.0, 0.0), (0.0, answer, 0.0)]
        return [(-self.search, 0.0, answer)]

    def true_gradient(self) -> Vector:
        def variance(p: float) -> float:
            return p * (1 - p)

        gain = self.right - self.right_at_once + self.reward
        return (
            variance(self.search) * gain,
            self.search * variance(self.right),
            (1 - self.search) * variance(self.right_at_once),
        )

    def trajectory(self, index: int, rollout: Rollout) -> Trajectory:
        searched, right = rollout
        rewards = [self.reward, None] if searched else [None]
        turns = tuple(
            Turn(
                prompt_ids=(0,),
                sampled_ids=(2 * k + (searched if k == 0 else right),),
                logprobs=(0.0,),
                text="",
                finish="stop",
                reward=reward,
            )
            for k, reward in enumerate(rewards)
        )
        return Trajectory(
            task_id=TASK.id, index=index, turns=turns, status=Status.FINISHED, outcome=float(right)
        )


CASES = {
    "worth its price": Case(search=0.5, right=0.5, right_at_once=0.3, reward=-0.01),
    "worth its price, rare": Case(search=0.2, right=0.5, right_at_once=0.3, reward=-0.01),
    "not worth it": Case(search=0.5, right=0.3, right_at_once=0.5, reward=0.01),
    "not worth it, rare": Case(search=0.2, right=0.3, right_at_once=0.5, reward=0.01),
}


def groups_of(case: Case, size: int, samples: int) -> list[tuple[float, tuple[Rollout, ...]]]:
    """(probability, rollouts) of all groups, or of sampled ones for more than 3 rollouts."""
    if size <= 3:
        return [
            (math.prod(map(case.probability, rollouts)), rollouts)
            for rollouts in product(KINDS, repeat=size)
        ]
    draw, weights = random.Random(0), [case.probability(kind) for kind in KINDS]
    return [(1 / samples, tuple(draw.choices(KINDS, weights, k=size))) for _ in range(samples)]


def advantages(
    rule: str, options: dict[str, Any], groups: Sequence[Group], weights: Sequence[float]
) -> list[Sequence[Sequence[float]]]:
    if rule != "turn_grpo":
        return [credit.advantages for credit in assign_credits(groups, rule, **options)]
    squares = (w * turn_grpo.spread(g) ** 2 for w, g in zip(weights, groups, strict=True))
    batch_spread = math.sqrt(math.fsum(squares))
    return [turn_grpo.advantages(group, batch_spread, **options) for group in groups]


def expected_gradients(
    case: Case, size: int, samples: int, rule: str, options: dict[str, Any]
) -> dict[str, Vector]:
    """The expected gradient for every normaliser."""
    drawn = groups_of(case, size, samples)
    weights = [weight for weight, _ in drawn]
    groups = [
        Group(task=TASK, trajectories=tuple(case.trajectory(i, r) for i, r in enumerate(rollouts)))
        for _, rollouts in drawn
    ]
    totals = {name: [0.0, 0.0, 0.0] for name in NORMALIZERS}
    rows_by_group = advantages(rule, options, groups, weights)
    for (weight, rollouts), rows in zip(drawn, rows_by_group, strict=True):
        tokens = sum(map(len, rows))
        for rollout, row in zip(rollouts, rows, strict=True):
            scales = {"constant": size, "token": tokens, "sequence": size * len(row)}
            for advantage, score in zip(row, case.scores(rollout), strict=True):
                for name, scale in scales.items():
                    for d in range(3):
                        totals[name][d] += weight * advantage * score[d] / scale
    return {name: (x, y, z) for name, (x, y, z) in totals.items()}


def cosine(a: Vector, b: Vector) -> float:
    norms = math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / norms if norms else 0.0


def measure(case: Case, samples: int) -> dict[str, Any]:
    true = case.true_gradient()
    found = {
        name: {str(size): expected_gradients(case, size, samples, rule, options) for size in SIZES}
        for name, (rule, options) in RULES.items()
    }
    found["fading"] = {
        size: {
            name: tuple((a + b) / 2 for a, b in zip(early[name], late[name], strict=True))
            for name in NORMALIZERS
        }
        for size, early in found["turn_grpo, scale per turn"].items()
        for late in [found["turn_grpo"][size]]
    }
    return {
        "true_search_gradient": true[0],
        "rules": {
            rule: {
                size: {
                    name: {"search_gradient": gradient[0], "cosine": cosine(gradient, true)}
                    for name, gradient in by_normalizer.items()
                }
                for size, by_normalizer in by_size.items()
            }
            for rule, by_size in found.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=20_000, help="sampled groups of 8")
    parser.add_argument("--out", type=Path, default=RESULTS / "credit_direction.json")
    options = parser.parse_args()
    cases = {name: measure(case, options.samples) for name, case in CASES.items()}
    record = {**provenance(), "samples": options.samples, "sizes": SIZES, "cases": cases}
    for name, case in cases.items():
        print(f"{name}: true gradient of the search logit {case['true_search_gradient']:+.4f}")
        for rule, by_size in case["rules"].items():
            cells = [
                f"{size}: {row['search_gradient']:+.3f}, cosine {row['cosine']:.3f}"
                for size, by_normalizer in by_size.items()
                for row in [by_normalizer["constant"]]
            ]
            print(f"  {rule:<26} {'  '.join(cells)}")
    print(write(record, options.out))


if __name__ == "__main__":
    main()
