"""The top of the page: the verdict, three numbers, and the file's size beside others."""

from __future__ import annotations

from sqakd_fx.report.charts import Chart, bars, bars_height
from sqakd_fx.report.held import Held
from sqakd_fx.report.markup import paragraph, text
from sqakd_fx.results.figures import (
    accuracy_lines,
    file_size,
    number_of,
    speed,
    verdict,
)


def overview(held: Held) -> str:
    """Verdict and three numbers."""
    good, sentence = verdict(held.raw)
    cards = (_score(held), _size(held), _speed(held))
    return (
        f'<p class="verdict {"good" if good else "bad"}">{text(sentence)}</p>'
        f'<div class="cards">{"".join(_card(*card) for card in cards)}</div>'
    )


def _card(title: str, value: str, *lines: str) -> str:
    below = "".join(paragraph(line) for line in lines)
    return (
        f'<div class="card"><h3>{text(title)}</h3><p class="value">{text(value)}</p>{below}</div>'
    )


def _score(held: Held) -> tuple[str, ...]:
    """The first that is known: the score on labels, the share of equal predictions, the cosine."""
    lines = accuracy_lines(held.raw)
    accuracy = held.raw["accuracy"]
    if accuracy is not None and accuracy.get("onnx") is not None:
        metric = held.raw["metric"]
        return (metric, number_of(accuracy["onnx"], metric), *lines)
    if not held.report.outputs:
        return "accuracy", "not measured"
    first = held.report.outputs[0]
    if first.agreement is not None:
        return ("same prediction as float", f"{first.agreement:.1%}", *lines)
    return ("relative error beside float", f"{first.relative_error:.2%}", *lines)


def _size(held: Held) -> tuple[str, ...]:
    return "size of the file", *_divided(file_size(held.raw), ", ")


def _speed(held: Held) -> tuple[str, ...]:
    value, *rest = _divided(speed(held.raw), " a call of ")
    return "time of a call", value, *(f"a batch of {words}" for words in rest)


def _divided(words: str, mark: str) -> tuple[str, ...]:
    """A sentence as its number and the rest."""
    value, _, rest = words.partition(mark)
    return (value, rest) if rest else (value,)


def sizes(held: Held) -> Chart:
    """The file beside the float model, its weights in 8 bits and packed, and the other files of the folder."""
    whole, own = held.raw["float_onnx_bytes"], held.raw["onnx_bytes"]
    found: dict[str, float | None] = {"float model": whole} if whole else {}
    found["model.onnx"] = own
    found |= {name: count for name, count in held.files.items() if name != "model.onnx"}
    coded = sum(layer.parameters for layer in held.report.layers)
    packed = held.raw["nominal_weight_bytes"]
    nominal = sum(layer.weight_bytes for layer in held.report.layers)
    if coded:
        found["weights at 8 bits"] = packed - nominal + coded
        found["weights, packed"] = packed
    kib = [None if count is None else count / 1024 for count in found.values()]
    choice = bars(list(found), kib, "KiB", "{:.0f} KiB")
    return Chart("sizes", [choice], bars_height(len(found)))
