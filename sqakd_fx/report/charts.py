"""Charts as Plotly takes them: plain JSON, drawn by the page's script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqakd_fx.report.markup import text

BLUE, ORANGE, GREEN, GREY, RED = "#2457a6", "#d9730d", "#2f8f5b", "#9aa3ad", "#c0392b"
_LOG, _FROM_ZERO = {"type": "log"}, {"rangemode": "tozero"}
_GRID, _INK = "#e6e9ed", "#1f2933"

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Choice:
    """One thing that a chart can show, under the label by which it is chosen."""

    label: str
    data: Sequence[Json]
    layout: Json


@dataclass(frozen=True)
class Chart:
    """A place on the page, and what can be drawn there.

    Attributes:
        name: of the element; letters alone.
        height: in pixels.
        choose: what the reader chooses by the list above the chart; there is none for one choice.
        cell: pixels of one unit of x and y; where given, the chart opens at this scale and is moved and zoomed.
    """

    name: str
    choices: Sequence[Choice]
    height: int
    choose: str = "Show"
    cell: tuple[int, int] | None = None

    def place(self, *, tall: bool = False) -> str:
        """The element; a tall chart scrolls in its own box."""
        if not self.choices:
            return ""
        chooser = ""
        if len(self.choices) > 1:
            options = "".join(
                f'<option value="{index}">{text(one.label)}</option>'
                for index, one in enumerate(self.choices)
            )
            chooser = f'<label>{text(self.choose)} <select data-chart="{self.name}">{options}</select></label>'
        box = "box tall" if tall else "box"
        return f'{chooser}<div class="{box}"><div id="{self.name}" class="chart"></div></div>'

    def spec(self) -> dict[str, Any]:
        """What the page's script draws."""
        return {
            "name": self.name,
            "cell": self.cell,
            "choices": [
                {"data": one.data, "layout": _layout(one.layout, self.height)}
                for one in self.choices
            ],
        }


def _layout(given: Json, height: int) -> dict[str, Any]:
    base = {
        "height": height,
        "margin": {"l": 56, "r": 16, "t": 12, "b": 48},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": _INK},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "hoverlabel": {"align": "left"},
    }
    return base | dict(given)


def axis(title: str, **settings: Any) -> dict[str, Any]:
    """An axis with a title, in the page's colours."""
    plain = {"title": {"text": text(title), "standoff": 8}, "gridcolor": _GRID, "zeroline": False}
    return {**plain, "automargin": True, **settings}


def _beside_short_bars(values: Sequence[float | None]) -> list[str]:
    """Where the words of each bar stand: a bar that is short on a narrow screen has no room for them."""
    longest = max((value for value in values if value is not None), default=0.0)
    held = [value is not None and value > longest / 3 for value in values]
    return ["inside" if one else "outside" for one in held]


def bars(
    names: Sequence[str],
    values: Sequence[float | None],
    title: str,
    form: str,
    *,
    log: bool = False,
) -> Choice:
    """Horizontal bars in order, the first on top; what is not known has none, nor has zero on a logarithmic axis."""
    shown = ["–" if value is None else form.format(value) for value in values]
    places = list(range(len(names)))
    trace = {
        "type": "bar",
        "orientation": "h",
        "x": list(values),
        "y": places,
        "marker": {"color": BLUE},
        "text": shown,
        "textposition": "auto" if log else _beside_short_bars(values),
        "textangle": 0,
        "textfont": {"size": 11},
        "constraintext": "none",
        "insidetextanchor": "end",
        "cliponaxis": False,
        "hoverinfo": "text",
        "hovertext": [f"{text(name)}<br>{value}" for name, value in zip(names, shown, strict=True)],
    }
    layout = {
        "xaxis": {"visible": False, "fixedrange": True, **(_LOG if log else _FROM_ZERO)},
        "yaxis": {
            "tickvals": places,
            "ticktext": [text(short(name)) for name in names],
            "range": [len(names) - 0.4, -0.6],
            "automargin": True,
            "fixedrange": True,
        },
        "margin": {"l": 8, "r": 48, "t": 4, "b": 4},
        "bargap": 0.3,
    }
    return Choice(title, [trace], layout)


def bars_height(count: int) -> int:
    """Pixels for so many bars."""
    return 8 + 22 * max(count, 3)


def short(name: str, most: int = 24) -> str:
    """The end of a long name, which is what tells layers apart."""
    return name if len(name) <= most else f"…{name[1 - most :]}"
