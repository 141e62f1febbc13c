"""The choice of one option for each group is the best that the limit allows."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqakd_fx.mixed_precision.knapsack import solve

Problem = list[list[tuple[float, int]]]


def chosen(problem: Problem, limit: float) -> tuple[float, int] | None:
    """(value, cost) of the solution."""
    found = solve([[v for v, _ in g] for g in problem], [[c for _, c in g] for g in problem], limit)
    if found is None:
        return None
    taken = [group[choice] for group, choice in zip(problem, found, strict=True)]
    return sum(value for value, _ in taken), sum(cost for _, cost in taken)


def textbook_optimum(problem: Problem, limit: int) -> float:
    """Least value by a table over every whole cost up to the limit."""
    table = np.zeros(limit + 1)
    for group in problem:
        longer = np.full(limit + 1, np.inf)
        for value, cost in group:
            if cost <= limit:
                longer[cost:] = np.minimum(longer[cost:], table[: limit + 1 - cost] + value)
        table = longer
    return float(table[limit])


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.floats(-5, 5), st.integers(0, 20)), min_size=1, max_size=4),
        min_size=1,
        max_size=6,
    ),
    st.integers(0, 100),
)
def test_the_solution_is_the_best_of_all_combinations(problem: Problem, limit: int) -> None:
    possible = [
        sum(value for value, _ in taken)
        for taken in itertools.product(*problem)
        if sum(cost for _, cost in taken) <= limit
    ]
    found = chosen(problem, limit)
    if not possible:
        assert found is None
        return
    assert found is not None
    assert found[1] <= limit
    assert found[0] == pytest.approx(min(possible), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_a_large_problem_is_solved_as_by_a_table_over_all_costs(seed: int) -> None:
    chance = np.random.default_rng(seed)
    sizes = chance.integers(1, 400, 60)
    widths = (2, 3, 4, 6, 8)
    problem = [
        [(float(a * 4.0**-b * (1 + 0.3 * chance.random())), int(n * b)) for b in widths]
        for n, a in zip(sizes, 10 ** chance.uniform(-5, 0, 60), strict=True)
    ]
    limit = int(sizes.sum() * chance.uniform(2.1, 6))
    found = chosen(problem, limit)
    assert found is not None
    assert found[1] <= limit
    assert found[0] == pytest.approx(textbook_optimum(problem, limit), rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_values_in_proportion_to_costs_do_not_slow_it_down(seed: int) -> None:
    sizes = np.random.default_rng(seed).integers(100, 400, 40)
    problem = [[(float(n * 4.0**-b), int(n * b)) for b in (2, 4, 8)] for n in sizes]
    limit = int(sizes.sum() * 3.3)
    found = chosen(problem, limit)
    assert found is not None
    assert found[0] == pytest.approx(textbook_optimum(problem, limit), rel=1e-6)


@pytest.mark.parametrize("broken", [math.inf, math.nan])
def test_a_value_that_is_no_number_is_taken_only_where_nothing_else_fits(broken: float) -> None:
    problem: Problem = [[(broken, 2), (1.0, 4)], [(broken, 2), (9.0, 4)]]
    values, costs = [[v for v, _ in g] for g in problem], [[c for _, c in g] for g in problem]
    assert solve(values, costs, 8) == [1, 1]
    assert solve(values, costs, 6) == [1, 0]
    assert solve(values, costs, 4) == [0, 0]
