"""The graph of kernels, drawn from top to bottom."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx as nx

from sqakd_fx.errors import SqakdError
from sqakd_fx.report.charts import BLUE, GREEN, GREY, ORANGE, RED, Chart, Choice
from sqakd_fx.report.held import Held
from sqakd_fx.report.layers import activations
from sqakd_fx.report.markup import text
from sqakd_fx.runtime.kernels import Kernel, kernels_of

_CELL = (210, 40)
_KINDS = {
    "integer kernel": BLUE,
    "float kernel": ORANGE,
    "float to codes, or back": GREEN,
    "moves or clips values": GREY,
}
_OF_KIND = dict(zip(("integer", "float", "conversion", "moves"), _KINDS, strict=True))
_CURVE = 8
"""Points of an edge that goes past other kernels."""


@dataclass(frozen=True)
class Drawn:
    """A kernel and its place: column and row."""

    kernel: Kernel
    x: float
    y: int


def kernels_in(held: Held) -> tuple[tuple[Kernel, ...], str]:
    """The kernels of the folder's file in the installed runtime; none, and why, where it cannot be asked."""
    path = held.folder / "model.onnx"
    if not path.is_file():
        return (), "The folder holds no model.onnx."
    try:
        with tempfile.TemporaryDirectory() as folder:
            return kernels_of(path, Path(folder)), ""
    except SqakdError as error:
        return (), f"The installed runtime was not asked: {error}."
    except Exception as error:  # a file that is no model, or no model of this runtime
        return (), f"model.onnx cannot be read ({type(error).__name__})."


def kernel_graph(held: Held, kernels: Sequence[Kernel]) -> Chart:
    """The graph, coloured by kernels, by bits of weights, or by the distance of its tensors to float."""
    drawn = _placed(kernels)
    if not drawn:
        return Chart("kernels", [], 0)
    facts = _Facts(held)
    colourings: list[tuple[str, Callable[[Kernel], str], Mapping[str, str]]] = [
        ("kernels", lambda kernel: _OF_KIND[kernel.kind], _KINDS),
        ("bits of weights", facts.bits, facts.colours_of_bits(kernels)),
        ("difference to float", facts.distance, _DISTANCES),
    ]
    choices = [
        Choice(label, [_edges(drawn), *_nodes(drawn, facts, group, colours)], _LAYOUT)
        for label, group, colours in colourings
        if len({group(kernel) for kernel in kernels}) > 1 or label == "kernels"
    ]
    return Chart("kernels", choices, 620, choose="Colour by", cell=_CELL)


_LAYOUT = {
    "xaxis": {"visible": False},
    "yaxis": {"visible": False},
    "dragmode": "pan",
    "hovermode": "closest",
    "showlegend": True,
    "margin": {"l": 0, "r": 0, "t": 60, "b": 0},
    "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": GREY, "activecolor": BLUE},
    "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "itemwidth": 30},
}
_DISTANCES = {
    "40 dB and more": GREEN,
    "30 to 40 dB": BLUE,
    "20 to 30 dB": ORANGE,
    "below 20 dB": RED,
    "not known": GREY,
}


class _Facts:
    """What the folder says of a kernel's layer and of its output's grid."""

    def __init__(self, held: Held) -> None:
        self.layers = {layer.name: layer for layer in held.report.layers}
        self.tensors = {_grid_name(one.quantizer): one for one in activations(held)}

    def bits(self, kernel: Kernel) -> str:
        layer = self.layers.get(kernel.layer)
        known = layer is not None and layer.weight_bits is not None
        return f"{layer.weight_bits} bits" if layer is not None and known else "no weight"

    def colours_of_bits(self, kernels: Sequence[Kernel]) -> dict[str, str]:
        groups = sorted({self.bits(kernel) for kernel in kernels} - {"no weight"})
        colours = (BLUE, ORANGE, GREEN, RED, "#7a5195", "#148f9e", "#5c4033", "#d45087")
        return dict(zip(groups, colours)) | {"no weight": GREY}

    def distance(self, kernel: Kernel) -> str:
        tensor = self.tensors.get(kernel.grid)
        if tensor is None or tensor.distance is None:
            return "not known"
        bounds = zip((40, 30, 20, float("-inf")), _DISTANCES)
        return next(label for bound, label in bounds if tensor.distance >= bound)

    def hover(self, kernel: Kernel) -> str:
        layer, tensor = self.layers.get(kernel.layer), self.tensors.get(kernel.grid)
        lines = [f"<b>{text(kernel.operator)}</b>", text(kernel.name)]
        if kernel.made_of:
            lines.append(f"stands for {text(', '.join(kernel.made_of))}")
        if layer is not None and layer.weight_bits is not None:
            lines.append(f"weights: {layer.weight_bits} bits, {layer.parameters:,} values")
        if kernel.grid:
            lines.append(f"output on the grid {text(kernel.grid)}")
        if tensor is not None and tensor.distance is not None:
            lines.append(
                f"{tensor.bits} bits, {tensor.distance:.1f} dB over the difference to float"
            )
        return "<br>".join(lines)


def _grid_name(quantizer: str) -> str:
    """What the file calls the grid of a quantizer: relu.output_quantizer is relu."""
    return quantizer.removesuffix("quantizer").removesuffix("_").removesuffix("output").rstrip("._")


def _placed(kernels: Sequence[Kernel]) -> list[Drawn]:
    """Rows by the longest way from an input; in a row, by the columns of what is read."""
    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(kernels)))
    graph.add_edges_from((source, i) for i, one in enumerate(kernels) for source in one.inputs)
    columns: dict[int, float] = {}
    found: dict[int, Drawn] = {}
    for row, members in enumerate(nx.topological_generations(graph)):
        above = {i: [columns[source] for source in kernels[i].inputs] for i in members}
        means = {i: sum(xs) / len(xs) if xs else 0.0 for i, xs in above.items()}
        for place, i in enumerate(sorted(members, key=lambda i: (means[i], i))):
            columns[i] = place - (len(members) - 1) / 2
            found[i] = Drawn(kernels[i], columns[i], row)
    return [found[i] for i in range(len(kernels))]


def _edges(drawn: Sequence[Drawn]) -> dict[str, Any]:
    """All edges as one line with gaps; one that goes past other kernels bends to the left of them."""
    xs: list[float | None] = []
    ys: list[float | None] = []
    for end in drawn:
        for index in end.kernel.inputs:
            start = drawn[index]
            points = _CURVE if end.y - start.y > 1 else 1
            for part in range(points + 1):
                t = part / points
                bend = -0.9 * t * (1 - t) if points > 1 else 0.0
                xs.append(start.x + (end.x - start.x) * t + bend)
                ys.append(start.y + (end.y - start.y) * t)
            xs.append(None)
            ys.append(None)
    return {
        "type": "scatter",
        "mode": "lines",
        "x": xs,
        "y": ys,
        "line": {"color": "#c5ccd3", "width": 1.5, "shape": "spline"},
        "hoverinfo": "skip",
        "showlegend": False,
    }


def _nodes(
    drawn: Sequence[Drawn],
    facts: _Facts,
    group: Callable[[Kernel], str],
    colours: Mapping[str, str],
) -> list[dict[str, Any]]:
    """A trace for each colour, so that the legend shows and hides it."""
    traces = []
    for label, colour in colours.items():
        members = [one for one in drawn if group(one.kernel) == label]
        if members:
            traces.append(
                {
                    "type": "scatter",
                    "mode": "markers+text",
                    "name": text(label),
                    "x": [one.x for one in members],
                    "y": [one.y for one in members],
                    "text": [_label(one.kernel) for one in members],
                    "textposition": "middle right",
                    "textfont": {"size": 11},
                    "hovertext": [facts.hover(one.kernel) for one in members],
                    "hoverinfo": "text",
                    "marker": {"color": colour, "size": 13, "symbol": "square"},
                }
            )
    return traces


def _label(kernel: Kernel) -> str:
    where = kernel.layer if len(kernel.layer) <= 22 else f"…{kernel.layer[-21:]}"
    return f" {text(kernel.operator)}<br> {text(where)}" if where else f" {text(kernel.operator)}"
