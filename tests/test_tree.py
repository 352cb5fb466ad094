"""Prefix trees and their cuts against brute force."""

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
    reference,
    split_over_ranks,
)

# few symbols and short rows: equal rows, rows inside others and deep branches all occur
ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=12)


def flat(rows: list[list[int]]) -> tuple[torch.Tensor, list[int]]:
    return torch.tensor([t for row in rows for t in row]), [len(row) for row in rows]


def tree_inputs(rows: list[list[int]]) -> tuple[list[int], list[int], list[int]]:
    """Lengths, order and shared lengths, as the functions that cut a tree take them."""
    tree = prefix_tree(*flat(rows))
    return [len(row) for row in rows], tree.order_S.tolist(), tree.shared_S.tolist()


def prefixes(rows: list[list[int]]) -> set[tuple[int, ...]]:
    return {tuple(row[: n + 1]) for row in rows for n in range(len(row))}


def assert_each_row_once(parts: list[list[int]], rows: list[list[int]]) -> None:
    assert sorted(row for part in parts for row in part) == list(range(len(rows)))
    assert all(part == sorted(part) for part in parts)


@pytest.mark.skipif(load_error() is not None, reason="the C++ extension is not built")
@settings(max_examples=300, deadline=None)
@given(rows=ROWS)
def test_cpp_equals_the_reference(rows):
    pairs = zip(reference(*flat(rows)), torch.ops.turnfast.prefix_tree(*flat(rows)), strict=True)
    for i, (ours, cpp) in enumerate(pairs):
        assert ours.dtype == cpp.dtype and torch.equal(ours, cpp), PrefixTree.__slots__[i]


def test_tree_example():
    tree = prefix_tree(*flat([[5, 6, 7], [5, 6, 8, 9], [5, 6]]))
    assert tree.sources_T.tolist() == [0, 1, 2, 5, 6]
    assert tree.positions_T.tolist() == [0, 1, 2, 2, 3]
    assert tree.ends_T.tolist() == [5, 5, 3, 5, 5]
    assert tree.places.tolist() == [0, 1, 2, 0, 1, 3, 4, 0, 1]


@settings(max_examples=300, deadline=None)
@given(rows=ROWS)
def test_layout_has_each_distinct_prefix_once(rows):
    tree = prefix_tree(*flat(rows))
    assert len(tree.sources_T) == len(prefixes(rows))
    layout = flat(rows)[0][tree.sources_T]
    ends, depth = tree.ends_T.tolist(), tree.positions_T.tolist()
    for row, places in zip(rows, tree.places.split(flat(rows)[1]), strict=True):
        assert layout[places].tolist() == row
        places = places.tolist()
        assert [depth[place] for place in places] == list(range(len(row)))
        # by the rule of the mask the ancestors of the last token are exactly the row
        last = places[-1]
        assert [k for k in range(last + 1) if last < ends[k]] == places


@settings(max_examples=200, deadline=None)
@given(rows=ROWS)
def test_no_earlier_row_shares_more_than_the_previous_one(rows):
    _, order, shared = tree_inputs(rows)
    assert sorted(order) == list(range(len(rows)))
    common = lambda i, j: len(prefixes([rows[order[i]]]) & prefixes([rows[order[j]]]))
    for i, length in enumerate(shared):
        most = max((common(i, j) for j in range(i)), default=0)
        assert length == most == (common(i, i - 1) if i else 0)


@pytest.mark.parametrize(
    ("tokens", "lengths", "message"),
    [
        ([1, 2], [2, 0], "every row needs a token"),
        ([1, 2], [2, 1], "expected a sum of 2, got 3"),
        ([1.0], [1], "int64"),
    ],
)
def test_invalid_rows_are_errors(tokens, lengths, message):
    with pytest.raises(ValueError, match=message):
        prefix_tree(torch.tensor(tokens), lengths)


@settings(max_examples=300, deadline=None)
@given(rows=ROWS, budget=st.integers(7, 30), batch_cost=st.integers(0, 5))
def test_cut_is_the_cheapest_within_the_budget(rows, budget, batch_cost):
    lengths, order, shared = tree_inputs(rows)
    size = lambda batch: len(prefixes([rows[r] for r in batch]))
    options = {"batch_cost": batch_cost, "attention_span": 10**9}
    batches = cut_tree(lengths, order, shared, budget, **options)
    assert_each_row_once(batches, rows)
    assert all(size(batch) <= budget for batch in batches)
    best = [0]
    for stop in range(1, len(rows) + 1):
        runs = [(start, size(order[start:stop])) for start in range(stop)]
        best.append(min(best[start] + n + batch_cost for start, n in runs if n <= budget))
    assert sum(size(batch) + batch_cost for batch in batches) == best[-1]


@settings(max_examples=300, deadline=None)
@given(rows=ROWS, draw=st.randoms(), num_ranks=st.integers(1, 4), space=st.integers(0, 9))
def test_rows_of_an_owner_stay_together(rows, draw, num_ranks, space):
    inputs = tree_inputs(rows)
    owners = [draw.randrange(len(rows)) for _ in rows]
    size = lambda batch: len(prefixes([rows[r] for r in batch]))
    owned = [{r for r, owner in enumerate(owners) if owner == one} for one in set(owners)]
    budget = max(map(size, owned)) + space
    batches = cut_tree(*inputs, budget, owners=owners)
    rows_by_rank = split_over_ranks(*inputs, num_ranks, owners=owners)
    for parts in (batches, rows_by_rank):
        assert_each_row_once(parts, rows)
        assert all(any(one <= set(part) for part in parts) for one in owned)
    assert all(0 < size(batch) <= budget for batch in batches)
    assert len(rows_by_rank) == num_ranks


def test_cuts_are_between_groups():
    draw = random.Random(0)
    ids = lambda n: [draw.randrange(99) for _ in range(n)]
    system, rows = ids(20), []
    for _ in range(4):
        prompt = system + ids(30)
        rows += [prompt + ids(5) for _ in range(4)]
    inputs = tree_inputs(rows)
    batches = cut_tree(*inputs, 130)
    # the system prompt and two groups of 30 + 4 · 5 tokens fit, three groups do not
    assert [sorted({r // 4 for r in batch}) for batch in batches] == [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match="55 tokens is longer than the budget of 54"):
        cut_tree(*inputs, 54)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=9),
    num_ranks=st.integers(1, 4),
    span=st.sampled_from([1, 8, 4096]),
)
def test_largest_cost_of_a_rank_is_the_smallest_of_all_runs(rows, num_ranks, span):
    lengths, order, shared = tree_inputs(rows)

    def cost(part) -> int:
        depths = [len(prefix) for prefix in prefixes([rows[i] for i in part])]
        return sum(path_cost(n, span) - path_cost(n - 1, span) for n in depths)

    rows_by_rank = split_over_ranks(lengths, order, shared, num_ranks, attention_span=span)
    assert len(rows_by_rank) == num_ranks
    assert_each_row_once(rows_by_rank, rows)
    best = min(
        max(cost(order[a:b]) for a, b in pairwise((0, *cuts, len(rows))))
        for cuts in combinations_with_replacement(range(len(rows) + 1), num_ranks - 1)
    )
    assert max(map(cost, rows_by_rank)) == best


def test_ranks_of_many_groups_are_balanced():
    """64 groups of 8 rollouts of very different lengths: no rank is 5 % above the mean cost."""
    draw = random.Random(0)
    rows = []
    for _ in range(64):
        prompt = [draw.randrange(99) for _ in range(200)]
        for _ in range(8):
            length = int(draw.paretovariate(1.2) * 60) % 2000 + 20
            rows.append(prompt + [draw.randrange(99) for _ in range(length)])
    inputs = tree_inputs(rows)
    for num_ranks in (2, 4, 8):
        costs = []
        for part in split_over_ranks(*inputs, num_ranks):
            depths = prefix_tree(*flat([rows[i] for i in part])).positions_T.double()
            costs.append(float((2 * 4096 + 2 * depths + 1).sum()))
        assert max(costs) < 1.05 * sum(costs) / num_ranks


def test_more_ranks_than_rows_and_no_ranks():
    assert split_over_ranks([3], [0], [0], 3) == [[0], [], []]
    with pytest.raises(ValueError, match="num_ranks"):
        split_over_ranks([3], [0], [0], 0)
