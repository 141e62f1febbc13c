"""`sensitivity`: measure a source, choose bits, show and write what was found."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.table import Table
from torch import Tensor

from sqakd_fx.diagnostics.terminal import cells, wide_console
from sqakd_fx.engine.devices import choose_device
from sqakd_fx.ir.batches import rows
from sqakd_fx.mixed_precision.budget import Budget, choose_bits, totals, with_bits
from sqakd_fx.mixed_precision.sensitivity import (
    LayerSensitivity,
    measure_sensitivity,
    passes_needed,
)
from sqakd_fx.program import build_program
from sqakd_fx.recipe.keys import Recipe
from sqakd_fx.recipe.resolution import to_toml
from sqakd_fx.source.inputs import source_inputs, with_samples
from sqakd_fx.source.source import Source
from sqakd_fx.source.synthetic import DataFree
from sqakd_fx.storage import write_text
from sqakd_fx.training.live import Live


def measure_source(
    source: Source, recipe: Recipe, widths: Sequence[int], samples: int, live: Live
) -> list[LayerSensitivity]:
    """Sensitivity of every layer on the first `samples` of the unlabelled data."""
    live.stage("trace", "torch.fx graph, quantizers")
    program = build_program(
        source.model, source.example_inputs, recipe, example_kwargs=source.example_kwargs
    )
    wanted = source.train_data
    if isinstance(wanted, DataFree):
        live.stage("make data", wanted.sentence)
        device = choose_device(recipe.device)
        source = with_samples(source, program, wanted, device, live.progress)
    inputs = source_inputs(source, program)
    passes = passes_needed(program, widths)
    live.stage("measure", f"{samples} samples, forward only: the cost of {passes:.0f} full passes")
    return measure_sensitivity(
        program,
        recipe,
        _first(inputs.epoch(0), samples),
        candidates=widths,
        on_layer=live.progress,
    )


def _first(batches: Iterator[tuple[Tensor, ...]], samples: int) -> Iterator[tuple[Tensor, ...]]:
    for inputs in batches:
        yield rows(inputs, 0, samples)
        samples -= len(inputs[0])
        if samples <= 0:
            return


def choose_and_write(
    recipe: Recipe, layers: Sequence[LayerSensitivity], budget: Budget, path: Path
) -> dict[str, int]:
    """Bits by layer under the budget, written as a recipe; raises RecipeError, StorageError."""
    chosen = choose_bits(layers, budget)
    write_text(path, to_toml(with_bits(recipe, layers, chosen)))
    return chosen


def show(layers: Sequence[LayerSensitivity], chosen: Mapping[str, int], *, as_json: bool) -> None:
    """The ranking on stdout, as a table or as JSON."""
    if as_json:
        rows = [asdict(layer) | {"chosen_bits": chosen.get(layer.name)} for layer in layers]
        print(json.dumps(rows, indent=2))
        return
    widths = sorted({bits for layer in layers for bits in layer.divergence})
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("layer", overflow="fold")
    for title in ("weights", "MACs", *(f"{b} bits" for b in widths), *(["chosen"] * bool(chosen))):
        table.add_column(title, justify="right", no_wrap=True)
    for layer in layers:
        row = [layer.name, _short(layer.parameters), _short(layer.macs)]
        row += [_scientific(layer.divergence[b]) if b in layer.divergence else "" for b in widths]
        if chosen:
            row.append(str(chosen.get(layer.name, "")))
        table.add_row(*cells(*row))
    answer = wide_console()
    answer.print("KL to the float model where one layer alone has so many bits, worst layer first:")
    answer.print(table)
    if chosen:
        mean, size = totals(layers, dict(chosen))
        answer.print(f"mean weight bits: {mean:.3f}; weights in a packed file: {size:,} bytes")


def _short(count: int) -> str:
    """A count in at most five characters."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def _scientific(value: float) -> str:
    """Two digits and the power of ten, in six characters: 6.2e-4."""
    digits, _, power = f"{value:.1e}".partition("e")
    return f"{digits}e{int(power)}"
