"""The samples on which the file is farthest from the float model."""

from __future__ import annotations

from sqakd_fx.report.held import Held
from sqakd_fx.report.markup import number, table
from sqakd_fx.results.farthest import FarSample


def sample_table(held: Held) -> str:
    """One line a sample: its index, what changes, and the largest values of both models."""
    rows = [
        [
            number(one.index, "{:.0f}"),
            one.output,
            number(_percent(one.relative_error), "{:.2f}"),
            _changed(one),
            _values(one),
        ]
        for one in held.report.farthest_samples
    ]
    titles = ["sample", "output", "relative error, %", "prediction", "position: float → file"]
    return table(titles, rows)


def _percent(share: float) -> float:
    return 100 * share


def _changed(one: FarSample) -> str:
    if one.changed is None:
        return "–"
    if one.changed == 0:
        return "same"
    return "another" if one.changed == 1 else f"{one.changed:.2%} others"


def _values(one: FarSample) -> str:
    found = zip(one.positions, one.float_values, one.values)
    return ";  ".join(f"{at}: {wanted:.4g} → {got:.4g}" for at, wanted, got in found)
