"""Histograms of weights and activations, with the grids that they were put on."""

from __future__ import annotations

from typing import Any

from sqakd_fx.report.charts import BLUE, GREEN, ORANGE, Chart, Choice, axis
from sqakd_fx.report.held import Held
from sqakd_fx.results.tensors import TensorFacts

_MOST_LINES = 33
_MOST_TENSORS = 400


def histograms(held: Held) -> Chart:
    """One tensor at a time, in graph order."""
    choices = [_histogram(one) for one in held.tensors[:_MOST_TENSORS] if one.counts]
    return Chart("histogram", choices, 340, choose="Tensor")


def _histogram(one: TensorFacts) -> Choice:
    width = (one.end - one.start) / len(one.counts)
    highest = one.lowest + one.step * (one.levels - 1)
    bars = {
        "type": "bar",
        "x": [one.start + (index + 0.5) * width for index in range(len(one.counts))],
        "y": list(one.counts),
        "width": width,
        "marker": {"color": BLUE if one.role == "activation" else GREEN},
        "name": "values",
        "hoverinfo": "x+y",
    }
    unit = "value" if one.role == "activation" else "weight, in steps of its grid"
    layout = {
        "xaxis": axis(unit),
        "yaxis": axis("count", type="log", exponentformat="power", dtick=1),
        "bargap": 0,
        "showlegend": False,
        "shapes": [_inside(one.lowest, highest), *_lines(one)],
    }
    label = f"{one.tensor} ({one.role}, {one.bits} bits, {one.levels} levels)"
    return Choice(label, [bars], layout)


def _inside(lowest: float, highest: float) -> dict[str, Any]:
    """The interval that the grid covers."""
    return {
        "type": "rect",
        "xref": "x",
        "yref": "paper",
        "x0": lowest,
        "x1": highest,
        "y0": 0,
        "y1": 1,
        "fillcolor": "rgba(217,115,13,0.08)",
        "line": {"width": 1, "color": ORANGE},
        "layer": "below",
    }


def _lines(one: TensorFacts) -> list[dict[str, Any]]:
    """The numbers that the grid holds, where they are few enough to be told apart."""
    if one.levels > _MOST_LINES:
        return []
    return [
        {
            "type": "line",
            "xref": "x",
            "yref": "paper",
            "x0": one.lowest + index * one.step,
            "x1": one.lowest + index * one.step,
            "y0": 0,
            "y1": 1,
            "line": {"width": 1, "color": "rgba(217,115,13,0.6)"},
        }
        for index in range(one.levels)
    ]
