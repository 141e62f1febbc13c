"""The page: its sections, and one file with everything that it needs."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from sqakd_fx.errors import StorageError
from sqakd_fx.report.charts import Chart, bars_height
from sqakd_fx.report.curves import curves
from sqakd_fx.report.held import Held, read_held
from sqakd_fx.report.histograms import histograms
from sqakd_fx.report.kernel_graph import kernel_graph, kernels_in
from sqakd_fx.report.layers import layer_chart, layer_table, tensor_chart, tensor_table
from sqakd_fx.report.markup import folded, paragraph, section, text
from sqakd_fx.report.origin import command, deployment, facts
from sqakd_fx.report.overview import overview, sizes
from sqakd_fx.report.samples import sample_pictures, sample_table
from sqakd_fx.results.figures import date_words
from sqakd_fx.results.file_names import PAGE
from sqakd_fx.storage import finite, write_text

_TALL = 20
"""Bars from which a chart scrolls in a box."""


def write_page(folder: Path) -> Path:
    """Write report.html into a result folder, from what lies there.

    Raises:
        StorageError: the folder holds no finished run, is damaged or cannot be written, or Plotly is not installed.
    """
    plotly = _plotly()
    path = folder / PAGE
    write_text(path, page(read_held(folder), plotly))
    return path


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise StorageError(
            f"the HTML report needs the package plotly ({error}): pip install 'sqakd-fx[report]'"
        ) from None
    return str(get_plotlyjs())


def page(held: Held, plotly: str) -> str:
    """The whole page as one text, with Plotly's JavaScript in it."""
    body, charts = _content(held)
    specs = finite([chart.spec() for chart in charts if chart.choices])
    ours = _own("page.js")
    scripts = [one.replace("\r\n", "\n").replace("\r", "\n") for one in (plotly, ours)]
    title = f"{held.report.name}: {held.report.recipe}"
    return "\n".join(
        (
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_policy(scripts)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{text(title)}</title>",
            f"<style>{_own('page.css')}</style></head><body>",
            f"<header><h1>{text(title)}</h1>{_subtitle(held)}</header>",
            f"<main>{body}</main>",
            f'<script type="application/json" id="charts">{_inert(json.dumps(specs, allow_nan=False))}</script>',
            *(f"<script>{script}</script>" for script in scripts),
            "</body></html>\n",
        )
    )


def _content(held: Held) -> tuple[str, list[Chart]]:
    """The sections and the charts in them."""
    kernels, missing = kernels_in(held)
    bytes_, course = sizes(held), curves(held)
    layers, tensors = layer_chart(held), tensor_chart(held)
    values, graph = histograms(held), kernel_graph(held, kernels)
    report = held.report
    parts = (
        overview(held),
        section("Size", bytes_.place()),
        section("Training", _side_by_side(course), *map(paragraph, report.training_notes)),
        section("Layers", layers.place(tall=len(report.layers) > _TALL), layer_table(held)),
        section("Activations", _ABOUT_TENSORS * bool(tensors.choices), *_tensors(held, tensors)),
        section("Values and grids", _ABOUT_GRIDS * bool(values.choices), values.place()),
        section(
            "What ONNX Runtime runs",
            _ABOUT_KERNELS * bool(kernels),
            paragraph(missing),
            graph.place(),
        ),
        section(
            "Samples farthest from float",
            _about_samples(held),
            sample_pictures(held),
            sample_table(held),
        ),
        section("What stays in float", _left(held)),
        section("Checks", _items(report.validation_lines)),
        section("Run the file", deployment()),
        section("How it was made", facts(held), command(held)),
    )
    return "\n".join(parts), [bytes_, *course, layers, tensors, values, graph]


def _tensors(held: Held, chart: Chart) -> tuple[str, ...]:
    tall = chart.height > bars_height(_TALL)
    return chart.place(tall=tall), folded("as a table", tensor_table(held))


_ABOUT_TENSORS = paragraph(
    "Measured on a few training samples. The difference to float is that of the whole network up to this tensor; the "
    "noise of the grid is what this tensor's own quantizer adds. More decibels are better."
)
_ABOUT_GRIDS = paragraph(
    "The shaded interval is what the grid covers; lines are the numbers of a grid with few levels. What lies outside "
    "is clipped, and is counted at the ends."
)
_ABOUT_KERNELS = paragraph(
    "The graph that the ONNX Runtime of this machine makes of model.onnx. Drag to move, scroll or pinch to zoom, "
    "double-click for the whole graph. Each box says what it stands for."
)


def _side_by_side(charts: Sequence[Chart]) -> str:
    places = "".join(f"<div>{chart.place()}</div>" for chart in charts)
    return f'<div class="columns">{places}</div>' if places else ""


def _about_samples(held: Held) -> str:
    if not held.report.farthest_samples:
        return ""
    data = held.report.data
    evaluated = data is not None and data.evaluation is not None
    order = "of the evaluation data" if evaluated else "of the first epoch's training data"
    return paragraph(
        f"Among the first 512 samples {order}, counted from 0. Positions count within the output, flattened; the "
        "largest values of the float model are shown, and the file's largest. Images go from their darkest value to "
        "their brightest; an arrow leads from the float model's class to the file's."
    )


def _left(held: Held) -> str:
    lines = [f"{note.node}: {note.reason}" for note in held.report.stays_in_float]
    return _items(lines) or paragraph("Nothing was left out.")


def _items(lines: Sequence[str]) -> str:
    items = "".join(f"<li>{text(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def _subtitle(held: Held) -> str:
    report = held.report
    return paragraph(f"{date_words(report.date)} on {report.processor}; {report.source}")


def _policy(scripts: Sequence[str]) -> str:
    """What the browser may do: run these scripts and nothing else, and load nothing."""
    hashes = (base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in scripts)
    allowed = " ".join(f"'sha256-{one}'" for one in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def _inert(data: str) -> str:
    """JSON in which no tag begins or ends."""
    return data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _own(name: str) -> str:
    return (files("sqakd_fx.report") / name).read_text(encoding="utf-8")
