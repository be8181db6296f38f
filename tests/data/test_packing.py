"""Packing plans: a partition of the documents into rows that hold them."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdiff.data.packing import pack_plan, row_count, row_patterns, waste

lengths_of = st.lists(st.integers(1, 40), min_size=1, max_size=200).map(np.array)


def one_row_at_a_time(lengths: np.ndarray, row_length: int) -> list[list[int]]:
    """Lengths of the documents of each row: the longest that fits, again and again."""
    left = sorted(lengths.tolist())
    rows = []
    while left:
        row, room = [], row_length
        while any(size <= room for size in left):
            size = max(size for size in left if size <= room)
            left.remove(size)
            row.append(size)
            room -= size
        rows.append(row)
    return rows


@settings(max_examples=150, deadline=None)
@given(lengths=lengths_of, row_length=st.integers(40, 120), seed=st.integers(0, 9))
def test_a_plan_is_a_partition_that_fits(lengths, row_length, seed):
    plan = pack_plan(lengths, row_length, np.random.default_rng(seed))
    assert sorted(np.concatenate(plan).tolist()) == list(range(len(lengths)))
    assert max(lengths[row].sum() for row in plan) <= row_length
    assert len(plan) == row_count(lengths, row_length)
    again = pack_plan(lengths, row_length, np.random.default_rng(seed))
    assert [row.tolist() for row in again] == [row.tolist() for row in plan]


@settings(max_examples=100, deadline=None)
@given(lengths=lengths_of, row_length=st.integers(40, 120))
def test_planning_rows_together_equals_best_fit_row_by_row(lengths, row_length):
    rows = [
        [size for size, taken in row for _ in range(taken)]
        for row, repeat in row_patterns(lengths, row_length)
        for _ in range(repeat)
    ]
    assert rows == one_row_at_a_time(lengths, row_length)


def test_little_is_wasted_on_lengths_that_vary():
    lengths = np.random.default_rng(0).integers(20, 120, 2000)
    assert waste(lengths, row_count(lengths, 256), 256) < 0.02
    assert waste(np.full(100, 129), row_count(np.full(100, 129), 256), 256) > 0.49  # it can be bad


def test_seeds_differ_in_members_and_order():
    lengths = np.full(100, 10)
    first, second = (pack_plan(lengths, 40, np.random.default_rng(seed)) for seed in (0, 1))
    assert [row.tolist() for row in first] != [row.tolist() for row in second]
    assert {frozenset(row.tolist()) for row in first} != {frozenset(row.tolist()) for row in second}
