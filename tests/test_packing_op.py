"""Assignment of rows to micro-batches and ranks."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from turnfast.kernels.extension import load_error
from turnfast.kernels.packing.first_fit import first_fit_decreasing, pack_rows, spread_rows

needs_extension = pytest.mark.skipif(load_error() is not None, reason=f"no _C: {load_error()}")
rows_and_budget = st.integers(1, 200).flatmap(
    lambda budget: st.tuples(st.lists(st.integers(0, budget), max_size=200), st.just(budget))
)


@given(rows_and_budget)
def test_every_row_occurs_once_and_no_micro_batch_exceeds_the_budget(case):
    lengths, budget = case
    batches = pack_rows(lengths, budget)
    assert sorted(row for rows in batches for row in rows) == list(range(len(lengths)))
    assert all(rows == sorted(rows) and rows for rows in batches)
    assert all(sum(lengths[row] for row in rows) <= budget for rows in batches)


@given(rows_and_budget)
def test_first_fit_leaves_no_two_half_empty_micro_batches(case):
    lengths, budget = case
    loads = [sum(lengths[row] for row in rows) for rows in pack_rows(lengths, budget)]
    assert sum(2 * load <= budget for load in loads) <= 1


@needs_extension
@given(rows_and_budget)
def test_cpp_equals_the_reference(case):
    lengths, budget = case
    assert torch.ops.turnfast.pack_rows(lengths, budget) == first_fit_decreasing(lengths, budget)


def test_first_fit_example():
    assert first_fit_decreasing([5, 9, 3, 4], 10) == [1, 0, 2, 1]
    assert pack_rows([5, 9, 3, 4], 10) == [[1], [0, 3], [2]]
    assert pack_rows([4, 4, 4], 8) == [[0, 1], [2]]
    assert pack_rows([], 8) == []


@pytest.mark.parametrize(
    ("lengths", "budget", "message"),
    [
        ([3, 11, 2], 10, r"lengths\[1\] is 11 tokens, more than the budget of 10"),
        ([3, -1], 10, r"lengths\[1\] is -1"),
        ([3], 0, "budget is 0"),
    ],
)
def test_impossible_rows_are_errors(lengths, budget, message):
    with pytest.raises(ValueError, match=message):
        pack_rows(lengths, budget)


@given(st.lists(st.integers(0, 50), max_size=9), st.integers(1, 3))
def test_largest_cost_of_a_rank_is_at_most_four_thirds_of_the_optimum(costs, num_ranks):
    rows_by_rank = spread_rows(costs, num_ranks)
    assert len(rows_by_rank) == num_ranks
    assert all(rows == sorted(rows) for rows in rows_by_rank)
    assert sorted(row for rows in rows_by_rank for row in rows) == list(range(len(costs)))
    best = sum(costs)
    for owners in product(range(num_ranks), repeat=len(costs)):
        loads = [0] * num_ranks
        for cost, owner in zip(costs, owners, strict=True):
            loads[owner] += cost
        best = min(best, max(loads))
    assert 3 * max(sum(costs[row] for row in rows) for rows in rows_by_rank) <= 4 * best


def test_ranks_example():
    assert spread_rows([7, 5, 1, 3], 2) == [[0, 2], [1, 3]]
