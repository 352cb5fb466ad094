"""Prefix trees against brute force: every distinct prefix once, depth first, and every cut pays."""

from __future__ import annotations

import random
from itertools import combinations_with_replacement, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from turnfast.kernels.extension import load_error
from turnfast.kernels.packing.tree import (
    PrefixTree,
    cut_tree,
    path_cost,
    prefix_tree,
    split_over_ranks,
)

IMPLS = ["python", *(["cpp"] if load_error() is None else [])]
FIELDS = ("sources_T", "positions_T", "ends_T", "places", "order_S", "shared_S")

# few symbols and short rows: equal rows, rows inside others and deep branches all come up
ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=12)


def build(rows: list[list[int]], impl: str = "python") -> PrefixTree:
    return prefix_tree(
        torch.tensor([t for row in rows for t in row]), [len(row) for row in rows], impl=impl
    )


def common(a: list[int], b: list[int]) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_the_worked_example(impl):
    tree = build([[5, 6, 7], [5, 6, 8, 9], [5, 6]], impl)
    assert tree.sources_T.tolist() == [0, 1, 2, 5, 6]
    assert tree.positions_T.tolist() == [0, 1, 2, 2, 3]
    assert tree.ends_T.tolist() == [5, 5, 3, 5, 5]
    assert tree.places.tolist() == [0, 1, 2, 0, 1, 3, 4, 0, 1]


@settings(max_examples=300, deadline=None)
@given(rows=ROWS, impl=st.sampled_from(IMPLS))
def test_each_distinct_prefix_is_there_once(rows, impl):
    tree = build(rows, impl)
    flat = [t for row in rows for t in row]
    starts = [sum(len(r) for r in rows[:i]) for i in range(len(rows))]
    prefixes = {tuple(row[: i + 1]) for row in rows for i in range(len(row))}
    assert len(tree.sources_T) == len(prefixes)
    layout = [flat[source] for source in tree.sources_T]
    ends, depth = tree.ends_T.tolist(), tree.positions_T.tolist()
    for begin, row in zip(starts, rows, strict=True):
        places = tree.places[begin : begin + len(row)].tolist()
        assert [layout[place] for place in places] == row
        assert [depth[place] for place in places] == list(range(len(row)))
        # the ancestors of its last token, by the mask's rule, are the row and nothing else
        last = places[-1]
        assert [k for k in range(last + 1) if last < ends[k]] == places


@settings(max_examples=200, deadline=None)
@given(rows=ROWS)
def test_the_order_shares_the_most_with_the_row_before(rows):
    tree = build(rows)
    order = tree.order_S.tolist()
    assert sorted(order) == list(range(len(rows)))
    for i, shared in enumerate(tree.shared_S.tolist()):
        most = max((common(rows[order[i]], rows[order[j]]) for j in range(i)), default=0)
        neighbour = common(rows[order[i]], rows[order[i - 1]]) if i else 0
        assert shared == most == neighbour


@pytest.mark.skipif(load_error() is not None, reason="the C++ extension is not built")
@settings(max_examples=300, deadline=None)
@given(rows=ROWS)
def test_both_builders_agree(rows):
    python, cpp = build(rows, "python"), build(rows, "cpp")
    for name in FIELDS:
        assert torch.equal(getattr(python, name), getattr(cpp, name)), name
        assert getattr(python, name).dtype == getattr(cpp, name).dtype, name


def test_what_is_no_tree_is_refused():
    with pytest.raises(ValueError, match="every row needs a token"):
        prefix_tree(torch.tensor([1, 2]), [2, 0])
    with pytest.raises(ValueError, match="expected a sum of 2, got 3"):
        prefix_tree(torch.tensor([1, 2]), [2, 1])
    with pytest.raises(ValueError, match="int64"):
        prefix_tree(torch.tensor([1.0]), [1])
    with pytest.raises(ValueError, match="impl"):
        prefix_tree(torch.tensor([1]), [1], impl="rust")


@settings(max_examples=300, deadline=None)
@given(rows=ROWS, budget=st.integers(7, 30), batch_cost=st.integers(0, 5))
def test_a_cut_deals_every_row_once_within_the_budget_and_is_the_cheapest(rows, budget, batch_cost):
    tree = build(rows)
    order, lengths = tree.order_S.tolist(), [len(row) for row in rows]
    cost = lambda batch: len({tuple(rows[r][: i + 1]) for r in batch for i in range(lengths[r])})
    batches = cut_tree(
        lengths, order, tree.shared_S.tolist(), budget, batch_cost=batch_cost, attention_span=10**9
    )
    assert sorted(r for batch in batches for r in batch) == list(range(len(rows)))
    assert all(cost(batch) <= budget for batch in batches)
    best = [0]
    for stop in range(1, len(rows) + 1):
        runs = [(start, cost(order[start:stop])) for start in range(stop)]
        best.append(min(best[start] + c + batch_cost for start, c in runs if c <= budget))
    assert sum(cost(batch) + batch_cost for batch in batches) == best[-1]


@settings(max_examples=300, deadline=None)
@given(rows=ROWS, draw=st.randoms(), num_ranks=st.integers(1, 4), room=st.integers(0, 9))
def test_rows_of_one_owner_stay_together(rows, draw, num_ranks, room):
    tree, lengths = build(rows), [len(row) for row in rows]
    order, shared = tree.order_S.tolist(), tree.shared_S.tolist()
    owners = [draw.randrange(len(rows)) for _ in rows]
    distinct = lambda batch: len(
        {tuple(rows[r][: i + 1]) for r in batch for i in range(lengths[r])}
    )
    theirs = [[r for r, owner in enumerate(owners) if owner == one] for one in set(owners)]
    budget = max(map(distinct, theirs)) + room
    cut = cut_tree(lengths, order, shared, budget, owners=owners)
    split = split_over_ranks(lengths, order, shared, num_ranks, owners=owners)
    for parts in (cut, split):
        assert sorted(r for part in parts for r in part) == list(range(len(rows)))
        assert all(part == sorted(part) for part in parts)
        assert all(any(set(one) <= set(part) for part in parts) for one in theirs)
    assert all(0 < distinct(batch) <= budget for batch in cut) and len(split) == num_ranks


def test_cuts_fall_between_groups():
    draw = random.Random(0)
    ids = lambda n: [draw.randrange(99) for _ in range(n)]
    system, rows = ids(20), []
    for _ in range(4):
        prompt = system + ids(30)
        rows += [prompt + ids(5) for _ in range(4)]
    tree = build(rows)
    lengths = [len(row) for row in rows]
    batches = cut_tree(lengths, tree.order_S.tolist(), tree.shared_S.tolist(), 130)
    # two groups of 30 + 4 · 5 tokens fit beside the system prompt, three do not
    assert [sorted({r // 4 for r in batch}) for batch in batches] == [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match="55 tokens is longer than the budget of 54"):
        cut_tree(lengths, tree.order_S.tolist(), tree.shared_S.tolist(), 54)


def run_cost(rows: list[list[int]], span: int) -> int:
    """Of the distinct tokens of rows, by definition."""
    prefixes = {tuple(row[: n + 1]) for row in rows for n in range(len(row))}
    return sum(path_cost(len(p), span) - path_cost(len(p) - 1, span) for p in prefixes)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=9),
    num_ranks=st.integers(1, 4),
    span=st.sampled_from([1, 8, 4096]),
)
def test_ranks_get_every_row_once_and_the_busiest_as_little_as_runs_allow(rows, num_ranks, span):
    tree, lengths = build(rows), [len(row) for row in rows]
    order, shared = tree.order_S.tolist(), tree.shared_S.tolist()
    dealt = split_over_ranks(lengths, order, shared, num_ranks, attention_span=span)
    assert len(dealt) == num_ranks
    assert sorted(i for run in dealt for i in run) == list(range(len(rows)))
    busiest = max(run_cost([rows[i] for i in run], span) for run in dealt if run)
    best = min(
        max(
            run_cost([rows[i] for i in order[a:b]], span)
            for a, b in pairwise((0, *cuts, len(rows)))
            if b > a
        )
        for cuts in combinations_with_replacement(range(len(rows) + 1), num_ranks - 1)
    )
    assert busiest == best


def test_ranks_of_many_groups_are_balanced():
    """64 groups of 8 rollouts of very different lengths: no rank does 5 % more than the mean."""
    draw = random.Random(0)
    rows = []
    for _ in range(64):
        prompt = [draw.randrange(99) for _ in range(200)]
        for _ in range(8):
            length = int(draw.paretovariate(1.2) * 60) % 2000 + 20
            rows.append(prompt + [draw.randrange(99) for _ in range(length)])
    tree, lengths = build(rows, "auto"), [len(row) for row in rows]
    order, shared = tree.order_S.tolist(), tree.shared_S.tolist()
    for num_ranks in (2, 4, 8):
        dealt = split_over_ranks(lengths, order, shared, num_ranks)
        costs = []
        for run in dealt:
            part = build([rows[i] for i in run], "auto")
            depths = part.positions_T.double()
            costs.append(float((2 * 4096 + 2 * depths + 1).sum()))
        assert max(costs) < 1.05 * sum(costs) / num_ranks


def test_more_ranks_than_rows_and_no_ranks():
    assert split_over_ranks([3], [0], [0], 3) == [[0], [], []]
    with pytest.raises(ValueError, match="num_ranks"):
        split_over_ranks([3], [0], [0], 0)
