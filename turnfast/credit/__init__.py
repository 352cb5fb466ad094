"""Credit: one advantage for every turn, from nothing but a group's rewards.

    credit = assign_credit(group, "mt_grpo", outcome_weight=0.5)
    credit.advantages[i][k]                                        turn k of rollout i

A rule is one file with one pure function `advantages(group, *, options) -> rows`, and one line in
`RULES` below. It sees only rollouts that count: those that failed are taken out beforehand, are in
no baseline, and get zeros; so does a group with fewer than two rollouts left. Every rule takes

    clip      advantages are cut to [-clip, clip]; last of all
    whiten    mean 0 and standard deviation 1 over all turns of the batch's groups that have a
              signal; groups without one keep their exact zeros
    flatten   the rule sees the same rewards moved to the end of the rollout: the ablation of
              turn-level credit that changes nothing else

and those that normalise also take `epsilon`, `std` and `baseline` (see `baseline.Norm`). A turn
reward of None adds nothing to a return; `mt_grpo`, which compares single rewards, has a choice.

`mt_ppo` and `turn_ppo` compare with a critic's values instead (`with_values.py`): they need no
peers and give, beside the advantages, targets for those values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

from turnfast.config.signature import suggest
from turnfast.credit.baseline import Rows
from turnfast.credit.frame import with_failed
from turnfast.credit.options import split_options
from turnfast.credit.rules import (
    branches as tree,
)
from turnfast.credit.rules import (
    dr,
    gigpo,
    grpo_mr,
    grpo_or,
    hybrid,
    mt_grpo,
    mt_grpo_unbiased,
    mt_ppo,
    return_to_go,
    rloo,
    turn_ppo,
)
from turnfast.credit.with_values import ValueRule, Values, credit_with_values
from turnfast.errors import ConfigError
from turnfast.types import Credit, Group

BatchRule = Callable[..., list[Rows]]


def per_group(rule: Callable[..., Rows]) -> BatchRule:
    """A rule that looks at one group at a time, as one over the groups of a batch."""

    @wraps(rule)
    def batch_rule(groups: Sequence[Group], **options: Any) -> list[Rows]:
        return [rule(group, **options) for group in groups]

    return batch_rule


RULES: dict[str, BatchRule] = {
    "dr": per_group(dr.advantages),
    "gigpo": per_group(gigpo.advantages),
    "grpo_mr": per_group(grpo_mr.advantages),
    "grpo_or": per_group(grpo_or.advantages),
    "hybrid": per_group(hybrid.advantages),
    "mt_grpo": per_group(mt_grpo.advantages),
    "mt_grpo_unbiased": per_group(mt_grpo_unbiased.advantages),
    "return_to_go": return_to_go.advantages,
    "rloo": per_group(rloo.advantages),
    "tree": per_group(tree.advantages),
}

VALUE_RULES: dict[str, ValueRule] = {
    "mt_ppo": ValueRule(estimate=mt_ppo.estimate, per="token"),
    "turn_ppo": ValueRule(estimate=turn_ppo.estimate, per="turn"),
}


def assign_credit(group: Group, rule: str = "mt_grpo", **options: Any) -> Credit:
    """The advantage of every turn of one group: `assign_credits` for a batch of one."""
    return assign_credits([group], rule, **options)[0]


def assign_credits(
    groups: Sequence[Group], rule: str = "mt_grpo", *, values: Values | None = None, **options: Any
) -> list[Credit]:
    """The advantage of every turn of a batch, one `Credit` per group, in order.

    Args:
        groups: ragged, empty, failed and equal-reward groups are ordinary input.
        rule: a name in `RULES` or `VALUE_RULES`.
        values: a critic's, for the rules in `VALUE_RULES`; others do not look at them.
        options: those of the rule, and those of every rule.
    Raises:
        ConfigError: unknown rule or option, or a value out of range.
        ValueError: a reward that is NaN or infinite, with its task, trajectory and turn.

    Example, two rollouts of two turns and `std="biased", epsilon=0.0, outcome_weight=0.5`:
    rewards (0.7, None) and outcome 0, rewards (0.0, None) and outcome 1.9, under mt_grpo
    -> advantages ((0.5, -1.0), (-0.5, 1.0)).
    """
    function = _find(rule)
    frame, arguments = split_options(function, options)
    if rule in VALUE_RULES:
        if values is None:
            raise ValueError(f"credit.rule: {rule!r} needs the values of a critic")
        return credit_with_values(rule, VALUE_RULES[rule], groups, values, frame, arguments)
    rows_by_group = function([frame.before(group) for group in groups], **arguments)
    return [
        Credit(rule=rule, advantages=with_failed(group, rows))
        for group, rows in zip(groups, frame.apply(rows_by_group), strict=True)
    ]


def check_rule(rule: str, options: Mapping[str, Any], *, num_ranks: int = 1) -> None:
    """Refuse, before anything runs, what `assign_credits` would refuse, and what compares the turns
    of a whole batch where each of several ranks has a part of it: raises ConfigError."""
    frame, arguments = split_options(_find(rule), options)
    if num_ranks == 1:
        return
    over_batch = {
        "whiten": (frame.whiten, "leave it at false"),
        "over": (arguments.get("over") == "batch", "take 'turn' or 'group'"),
    }
    for name, (asked, way) in over_batch.items():
        if asked:
            raise ConfigError(
                f"credit.options.{name}: is over all turns of the batch, of which each of "
                f"{num_ranks} ranks has only its own; {way}, or train on one rank"
            )


def _find(rule: str) -> Callable[..., Any]:
    if rule in VALUE_RULES:
        return VALUE_RULES[rule].estimate
    if rule not in RULES:
        known = [*RULES, *VALUE_RULES]
        raise ConfigError(f"credit.rule: no rule is called {rule!r}{suggest(rule, known)}")
    return RULES[rule]
