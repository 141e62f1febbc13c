"""The multiple-choice knapsack problem, solved to one part in a million.

    minimize    Σ over groups of value[group][choice]
    subject to  one choice for each group,  Σ cost[group][choice] <= limit

Dynamic programming over the groups, those with the largest costs first. A state is the (cost, value) of one choice
for each group so far. It is dropped where

- another state has no more cost and no more value, or
- its lower bound is not a millionth below the value of a known solution.

Both come from the linear relaxation of the groups that are left (Sinha and Zoltners 1979). Its optimal value as a
function of what may be spent is convex and piecewise linear: the steps along the lower convex hull of each group's
(cost, value) points, in the order of their slopes. Between two corners it bounds; every corner is a choice.
A state of the known solution is never dropped, so that the result is at most a millionth above the optimum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
Costs = NDArray[np.int64]
_Start = tuple[int, float]
_GAP, _ROUNDING = 1e-6, 1e-13


@dataclass(frozen=True)
class _Group:
    """The choices of one group: what they are worth and what they cost."""

    values: Values
    costs: Costs

    def hull(self) -> list[int]:
        """The choices on the lower convex hull, from the cheapest to the least value."""
        corners: list[int] = []
        for choice in np.lexsort((self.values, self.costs)):
            if corners and self.values[choice] >= self.values[corners[-1]]:
                continue
            while len(corners) > 1 and self._slope(corners[-2], choice) <= self._slope(
                corners[-2], corners[-1]
            ):
                corners.pop()
            corners.append(int(choice))
        return corners

    def _slope(self, start: int, end: int) -> float:
        return float(
            (self.values[end] - self.values[start]) / (self.costs[end] - self.costs[start])
        )


def solve(
    values: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], limit: float
) -> list[int] | None:
    """The position of the choice for each group; None where no choice of all groups is within `limit`."""
    groups = [_Group(v, np.array(c, np.int64)) for v, c in zip(_finite(values), costs, strict=True)]
    if sum(int(group.costs.min()) for group in groups) > limit:
        return None
    order = sorted(range(len(groups)), key=lambda i: -int(np.ptp(groups[i].costs)))
    chosen = _best([groups[i] for i in order], limit)
    return [choice for _, choice in sorted(zip(order, chosen, strict=True))]


def _finite(values: Sequence[Sequence[float]]) -> list[Values]:
    """The values, where one that is no finite number is above every choice of finite ones."""
    arrays = [np.array(v, np.float64) for v in values]
    largest = sum(float(np.abs(a[np.isfinite(a)]).sum()) for a in arrays) + 1.0
    return [np.where(np.isfinite(a), a, largest) for a in arrays]


@dataclass(frozen=True)
class _Relaxation:
    """The linear relaxation of a problem: the steps along all hulls in the order of their slopes."""

    owners: NDArray[np.intp]
    costs: Costs
    values: Values
    start: tuple[_Start, ...]

    @classmethod
    def of(cls, groups: Sequence[_Group]) -> _Relaxation:
        """With the group of each step, and where the hull of each group begins."""
        corners = [group.hull() for group in groups]
        owners = np.repeat(np.arange(len(groups)), [len(c) - 1 for c in corners])
        costs = np.concatenate([np.diff(g.costs[c]) for g, c in zip(groups, corners, strict=True)])
        values = np.concatenate(
            [np.diff(g.values[c]) for g, c in zip(groups, corners, strict=True)]
        )
        order = np.argsort(values / costs, kind="stable")
        start = tuple(
            (int(g.costs[c[0]]), float(g.values[c[0]]))
            for g, c in zip(groups, corners, strict=True)
        )
        return cls(owners[order], costs[order], values[order], start)

    def behind(self, number: int) -> tuple[Costs, Values]:
        """Corners of (what is spent, least value) over the groups behind group `number`."""
        mine = self.owners > number
        rest = self.start[number + 1 :]
        cost = np.cumsum([sum(c for c, _ in rest), *self.costs[mine]], dtype=np.int64)
        return cost, np.cumsum([sum(v for _, v in rest), *self.values[mine]])


def _best(groups: Sequence[_Group], limit: float) -> list[int]:
    """Extend the states group by group, and follow the best one back."""
    relaxation = _Relaxation.of(groups)
    cost, value, known = np.zeros(1, np.int64), np.zeros(1), np.inf
    rounding = _ROUNDING * sum(float(np.abs(group.values).max()) for group in groups)
    history = []
    for number, group in enumerate(groups):
        rest_cost, rest_value = relaxation.behind(number)
        costs = (cost[:, None] + group.costs).ravel()
        values = (value[:, None] + group.values).ravel()
        kept = _undominated(costs, values, limit - rest_cost[0])
        left = limit - costs[kept]
        corner = np.searchsorted(rest_cost, left, side="right") - 1
        complete = values[kept] + rest_value[corner]
        bound = values[kept] + np.interp(left, rest_cost, rest_value)
        known = min(known, float(complete.min()))
        better = bound < known - _GAP * abs(known)
        kept = kept[better | (complete <= known + rounding)]
        cost, value = costs[kept], values[kept]
        history.append(np.divmod(kept, len(group.costs)))
    state, chosen = int(np.argmin(value)), []
    for parents, choices in reversed(history):
        chosen.append(int(choices[state]))
        state = int(parents[state])
    return chosen[::-1]


def _undominated(costs: Costs, values: Values, limit: float) -> NDArray[np.intp]:
    """The states within `limit` for which no other has at most their cost and at most their value."""
    possible = np.flatnonzero(costs <= limit)
    order = possible[np.lexsort((values[possible], costs[possible]))]
    least = np.minimum.accumulate(values[order])
    return order[np.concatenate(([True], values[order][1:] < least[:-1]))]
