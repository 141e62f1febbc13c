"""Layers and activations: bars of what each has, and the same as tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from sqakd_fx.program import LayerFacts
from sqakd_fx.report.charts import Chart, Choice, bars, bars_height
from sqakd_fx.report.held import Held
from sqakd_fx.report.markup import number, table
from sqakd_fx.results.tensors import TensorFacts

_Column = tuple[str, Sequence[float | None], str]
"""Title, values, form."""
_KL = "KL where it alone "


def layer_columns(held: Held) -> list[_Column]:
    """What is known of each layer, in graph order."""
    layers = held.report.layers
    weights = [_weight_of(held, layer) for layer in layers]
    found: list[_Column] = [
        ("weight bits", [layer.weight_bits for layer in layers], "{:.0f}"),
        ("bits of its input", [layer.activation_bits for layer in layers], "{:.0f}"),
        ("KiB in the file", [_stored(held, layer) for layer in layers], "{:.1f}"),
        ("KiB at its own bits", [_own_size(layer) for layer in layers], "{:.1f}"),
        (
            "signal over noise of the weights, dB",
            [None if one is None else one.grid_noise for one in weights],
            "{:.1f}",
        ),
        *_sensitivity(held),
    ]
    return _known(found)


def _sensitivity(held: Held) -> list[_Column]:
    """What each layer alone costs at its own bits, and at others that every layer was measured with."""
    measured = {one.name: one for one in held.sensitivity}
    rows = [measured.get(layer.name) for layer in held.report.layers]
    own = [None if row is None else row.divergence.get(row.weight_bits) for row in rows]
    found: list[_Column] = [(f"{_KL}is quantized", own, "{:.2g}")]
    shared = [set(row.divergence) for row in rows if row is not None]
    for bits in sorted(set.intersection(*shared)) if shared else ():
        values = [None if row is None else row.divergence.get(bits) for row in rows]
        if values != own:
            found.append((f"{_KL}has {bits} bits", values, "{:.2g}"))
    return found


def _known(columns: Sequence[_Column]) -> list[_Column]:
    return [one for one in columns if any(value is not None for value in one[1])]


def _weight_of(held: Held, layer: LayerFacts) -> TensorFacts | None:
    if layer.weight_bits is None:
        return None
    return next(
        (
            one
            for one in held.tensors
            if one.role == "weight" and one.quantizer.startswith(f"{layer.name}.weight")
        ),
        None,
    )


def _own_size(layer: LayerFacts) -> float | None:
    return None if layer.weight_bits is None else layer.weight_bytes / 1024


def _stored(held: Held, layer: LayerFacts) -> float | None:
    found = [one.size for one in held.report.stored_weights if one.name == f"{layer.name}.weight"]
    return found[0] / 1024 if found else None


def tensor_columns(held: Held, tensors: Sequence[TensorFacts]) -> list[_Column]:
    """What is known of each quantized activation, in graph order."""
    search = held.report.sensitive_tensors
    costs = (
        {one.quantizer: max(one.errors, default=0.0) for one in search.tensors} if search else {}
    )
    found: list[_Column] = [
        ("signal over difference to float, dB", [one.distance for one in tensors], "{:.1f}"),
        ("signal over noise of its grid alone, dB", [one.grid_noise for one in tensors], "{:.1f}"),
        ("bits", [one.bits for one in tensors], "{:.0f}"),
        ("clipped, %", [100 * one.clipped for one in tensors], "{:.3g}"),
        (
            "error of an output by this tensor alone, %",
            [_percent(costs.get(one.quantizer)) for one in tensors],
            "{:.2g}",
        ),
    ]
    return _known(found)


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def activations(held: Held) -> list[TensorFacts]:
    """The quantized activations that were recorded."""
    return [one for one in held.tensors if one.role == "activation"]


def names_of(tensors: Sequence[TensorFacts]) -> list[str]:
    """Names, with the bits where a tensor is quantized twice."""
    seen = Counter(one.tensor for one in tensors)
    return [
        one.tensor if seen[one.tensor] == 1 else f"{one.tensor}, {one.bits} bits" for one in tensors
    ]


def _choices(names: Sequence[str], columns: Sequence[_Column]) -> list[Choice]:
    return [
        bars(names, values, title, form, log=title.startswith(_KL))
        for title, values, form in columns
    ]


def layer_chart(held: Held) -> Chart:
    """Bars by layer."""
    names = [layer.name for layer in held.report.layers]
    choices = _choices(names, layer_columns(held)) if names else []
    return Chart("layers", choices, bars_height(len(names)))


def tensor_chart(held: Held) -> Chart:
    """Bars by quantized activation."""
    tensors = activations(held)
    choices = _choices(names_of(tensors), tensor_columns(held, tensors))
    return Chart("tensors", choices if tensors else [], bars_height(len(tensors)))


def layer_table(held: Held) -> str:
    """All columns of the layers, with what each is and where its bits come from."""
    layers, columns = held.report.layers, layer_columns(held)
    rows = [
        [
            layer.name,
            layer.operation,
            *(number(values[index], form) for _, values, form in columns),
            layer.source,
        ]
        for index, layer in enumerate(layers)
    ]
    return table(["layer", "operation", *(title for title, _, _ in columns), "bits from"], rows)


def tensor_table(held: Held) -> str:
    """All columns of the quantized activations."""
    tensors = activations(held)
    columns = tensor_columns(held, tensors)
    names = names_of(tensors)
    rows = [
        [
            names[index],
            number(one.lowest, "{:.4g}"),
            number(one.lowest + one.step * (one.levels - 1), "{:.4g}"),
            *(number(values[index], form) for _, values, form in columns),
        ]
        for index, one in enumerate(tensors)
    ]
    return table(["tensor", "from", "to", *(title for title, _, _ in columns)], rows)
