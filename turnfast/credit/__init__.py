"""Credit: one advantage per turn, computed from the rewards of a group.

    credit = assign_credit(group, "mt_grpo", outcome_weight=0.5)
    credit.advantages[i][k]                                        turn k of rollout i

A rule is one file with one pure function `advantages(group, *, options) -> rows` and one line in
`RULES`. It receives only rollouts that did not fail. Failed rollouts are in no baseline and get
zeros; if fewer than two rollouts remain, the whole group gets zeros. Every rule has the options

    clip      clip advantages to [-clip, clip], after everything else
    whiten    normalise the advantages of all turns of the batch to mean 0 and standard deviation 1;
              groups whose advantages are all 0 are excluded and keep their zeros
    flatten   move all turn rewards into the outcome before the rule runs: an ablation that removes
              turn-level rewards and changes nothing else

and rules that normalise also have `epsilon`, `std` and `baseline` (see `baseline.Norm`). A turn
reward of None adds nothing to a return; `mt_grpo` has an option for it.

`mt_ppo` and `turn_ppo` compare with a critic's values instead (`with_values.py`): they need no
other rollouts and also return the targets of those values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from turnfast.config.signature import suggest
from turnfast.credit.baseline import Rows
from turnfast.credit.frame import with_failed
from turnfast.credit.options import split_options
from turnfast.credit.rules import (
    branches,
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
    turn_grpo,
    turn_ppo,
)
from turnfast.credit.with_values import ValueRule, Values, credit_with_values
from turnfast.errors import ConfigError
from turnfast.types import Credit, Group

GroupRule = Callable[..., Rows]
"""`rule(group, **options)`: one row per rollout, one advantage per turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRule:
    """A rule that scales a group relative to the other groups of the step.

    Attributes:
        advantages: `(group, batch_spread, **options)`, as a `GroupRule`.
        spread: `(group, outcome_weight)`; its root mean square over the groups of the step, on all
            ranks, is `batch_spread`.
    """

    advantages: Callable[..., Rows]
    spread: Callable[..., float]


Rule = GroupRule | BatchRule | ValueRule

RULES: dict[str, Rule] = {
    "dr": dr.advantages,
    "gigpo": gigpo.advantages,
    "grpo_mr": grpo_mr.advantages,
    "grpo_or": grpo_or.advantages,
    "hybrid": hybrid.advantages,
    "mt_grpo": mt_grpo.advantages,
    "mt_grpo_unbiased": mt_grpo_unbiased.advantages,
    "mt_ppo": ValueRule(estimate=mt_ppo.estimate, per="token"),
    "return_to_go": return_to_go.advantages,
    "rloo": rloo.advantages,
    "tree": branches.advantages,
    "turn_grpo": BatchRule(advantages=turn_grpo.advantages, spread=turn_grpo.spread),
    "turn_ppo": ValueRule(estimate=turn_ppo.estimate, per="turn"),
}


def assign_credit(group: Group, rule: str = "mt_grpo", **options: Any) -> Credit:
    """Compute the advantage of every turn of one group, see `assign_credits`."""
    return assign_credits([group], rule, **options)[0]


def assign_credits(
    groups: Sequence[Group],
    rule: str = "mt_grpo",
    *,
    values: Values | None = None,
    sums: Sequence[float] | None = None,
    **options: Any,
) -> list[Credit]:
    """Compute the advantage of every turn of a batch; returns one `Credit` per group.

    Args:
        groups: may be ragged, empty, or contain failed rollouts or equal rewards only.
        rule: a name in `RULES`.
        values: the critic's values; only `ValueRule`s use them.
        sums: `spread_sums` of all ranks; default: those of `groups`.
        options: options of the rule, and those of every rule.

    Raises:
        ConfigError: unknown rule or option, or a value out of range.
        ValueError: a reward is NaN or infinite; names its task, trajectory and turn.

    Example, two rollouts of two turns and `std="biased", epsilon=0.0, outcome_weight=0.5`:
    rewards (0.7, None) and outcome 0, rewards (0.0, None) and outcome 1.9, under mt_grpo
    -> advantages ((0.5, -1.0), (-0.5, 1.0)).
    """
    found = _find(rule)
    frame, arguments = split_options(_function(found), options)
    if isinstance(found, ValueRule):
        if values is None:
            raise ValueError(f"credit.rule: {rule!r} needs the values of a critic")
        return credit_with_values(rule, found, groups, values, frame, arguments)
    seen = [frame.before(group) for group in groups]
    if isinstance(found, BatchRule):
        squares, count = _spread_sums(found, seen, arguments) if sums is None else sums
        batch_spread = math.sqrt(squares / count) if count else 0.0
        rows_by_group = [found.advantages(group, batch_spread, **arguments) for group in seen]
    else:
        rows_by_group = [found(group, **arguments) for group in seen]
    return [
        Credit(rule=rule, advantages=with_failed(group, rows))
        for group, rows in zip(groups, frame.after(rows_by_group), strict=True)
    ]


def spread_sums(groups: Sequence[Group], rule: str, **options: Any) -> list[float]:
    """The sum of the groups' squared spreads and their number, to be summed over the ranks.

    Zeros for rules that do not scale by the batch.
    """
    found = _find(rule)
    if not isinstance(found, BatchRule):
        return [0.0, 0.0]
    frame, arguments = split_options(found.advantages, options)
    return _spread_sums(found, [frame.before(group) for group in groups], arguments)


def check_rule(rule: str, options: Mapping[str, Any], *, num_ranks: int = 1) -> None:
    """Check a rule and its options before a run.

    Raises:
        ConfigError: `assign_credits` would raise it, or `whiten` is set on several ranks.
    """
    frame, _ = split_options(_function(_find(rule)), options)
    if frame.whiten and num_ranks > 1:
        raise ConfigError(
            "credit.options.whiten: needs the turns of the whole batch, but each of "
            f"{num_ranks} ranks has only a part of it; leave it at false, or train on one rank"
        )


def _find(rule: str) -> Rule:
    if rule not in RULES:
        raise ConfigError(f"credit.rule: no rule is called {rule!r}{suggest(rule, RULES)}")
    return RULES[rule]


def _function(rule: Rule) -> Callable[..., Any]:
    match rule:
        case ValueRule(estimate=function) | BatchRule(advantages=function):
            return function
    return rule


def _spread_sums(
    rule: BatchRule, groups: Sequence[Group], arguments: Mapping[str, Any]
) -> list[float]:
    own = {name: arguments[name] for name in ("outcome_weight",) if name in arguments}
    spreads = [rule.spread(group, **own) for group in groups if group.trajectories]
    return [math.fsum(s * s for s in spreads), float(len(spreads))]
