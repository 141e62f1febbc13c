"""The course of the training: loss and agreement over the steps."""

from __future__ import annotations

from typing import Any

from sqakd_fx.report.charts import BLUE, GREEN, ORANGE, Chart, Choice, axis
from sqakd_fx.report.held import Held

_HEIGHT = 280


def curves(held: Held) -> list[Chart]:
    """One chart for the loss and one for the agreement with float, as far as they are known."""
    charts = [Chart("loss", [_loss(held)], _HEIGHT)] if held.steps else []
    known = [step for step in held.steps if step.agreement is not None]
    if known or _judged(held, "agreement")[0]:
        charts.append(Chart("agreement", [_agreement(held)], _HEIGHT))
    return charts


def _line(x: list[int], y: list[Any], name: str, colour: str) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "x": x,
        "y": y,
        "name": name,
        "line": {"color": colour},
    }


def _judged(held: Held, what: str) -> tuple[list[int], list[float]]:
    """Steps and values of the judgement on held-out samples before and after the training."""
    report = held.report
    last = held.steps[-1].step if held.steps else report.steps or 0
    pairs = ((0, report.before_training), (last, report.after_training))
    known = [(step, getattr(one, what)) for step, one in pairs if one is not None]
    kept = [(step, value) for step, value in known if value is not None]
    return [step for step, _ in kept], [value for _, value in kept]


def _loss(held: Held) -> Choice:
    steps = [step.step for step in held.steps]
    values = [step.loss for step in held.steps]
    lines = [_line(steps, values, "training, mean since the last point", BLUE)]
    at, judged = _judged(held, "loss")
    if at:
        lines.append(_line(at, judged, "held-out samples", ORANGE))
    positive = all(value > 0 for value in (*values, *judged))
    scale = {"type": "log", "tickformat": ".2~g", "dtick": "D2"} if positive else {}
    layout = {"xaxis": axis("step"), "yaxis": axis("loss", **scale), "showlegend": True}
    return Choice("loss", lines, layout)


def _agreement(held: Held) -> Choice:
    known = [(step.step, step.agreement) for step in held.steps if step.agreement is not None]
    at, judged = _judged(held, "agreement")
    lines = []
    if known:
        x, y = [step for step, _ in known], [value for _, value in known]
        lines.append(_line(x, y, "while training", GREEN))
    if at:
        lines.append(_line(at, judged, "before and after", ORANGE))
    lowest = min((*(value for _, value in known), *judged), default=0.0)
    span = max(1 - lowest, 0.01)
    scale = {"tickformat": ".1%", "range": [1 - 1.05 * span, 1 + 0.05 * span]}
    layout = {
        "xaxis": axis("step"),
        "yaxis": axis("same prediction as float", **scale),
        "showlegend": True,
    }
    return Choice("agreement", lines, layout)
