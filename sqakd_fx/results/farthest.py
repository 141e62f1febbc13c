"""The samples on which the file is farthest from the float model."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from sqakd_fx.frontend.output_kinds import OutputKind
from sqakd_fx.results.shown_inputs import Numbers, Picture, shown_input

_KEPT, _VALUES = 8, 5


@dataclass(frozen=True)
class FarSample:
    """A sample, one output of it, and what both models make of that.

    Attributes:
        output: as the recipe calls it.
        index: of the sample, among those that were compared.
        relative_error: of the output, relative to the float model's.
        changed: share of its predictions that are others; None where the output has no classes.
        positions: of some values in the output, flattened: the largest ones of the float model and of the file.
        float_values, values: at these positions.
        shown: the sample's first input; None where it is not known.
    """

    output: str
    index: int
    relative_error: float
    changed: float | None
    positions: tuple[int, ...]
    float_values: tuple[float, ...]
    values: tuple[float, ...]
    shown: Picture | Numbers | None = None


class Farthest:
    """Keeps the farthest samples of one output, over all batches."""

    def __init__(self, kind: OutputKind) -> None:
        self.kind = kind
        self.samples: list[FarSample] = []
        self._seen = 0

    def add(self, got: Tensor, wanted: Tensor, inputs: Tensor | None = None) -> None:
        """One batch of the file's output, of the float model's, and of what the model's first input was."""
        if not wanted.ndim or not wanted.numel():
            return
        ours, theirs = (x.reshape(len(x), -1) for x in (got, wanted))
        errors = (ours - theirs).norm(dim=1) / theirs.norm(dim=1).clamp_min(1e-12)
        changed = None
        if self.kind.axis is not None:
            differs = got.argmax(self.kind.axis) != wanted.argmax(self.kind.axis)
            changed = differs.reshape(len(got), -1).double().mean(1) if differs.ndim else None
        order = errors if changed is None else errors + 1e6 * changed
        for row in order.topk(min(_KEPT, len(order))).indices.tolist():
            share = None if changed is None else float(changed[row])
            sample = self._sample(row, ours[row], theirs[row], (float(errors[row]), share))
            if inputs is not None and inputs.ndim and len(inputs) == len(wanted):
                sample = replace(sample, shown=shown_input(inputs[row]))
            self.samples.append(sample)
        self.samples = sorted(self.samples, key=_rank)[:_KEPT]
        self._seen += len(wanted)

    def _sample(
        self, row: int, ours: Tensor, theirs: Tensor, judged: tuple[float, float | None]
    ) -> FarSample:
        most = min(_VALUES, len(theirs))
        largest = [*theirs.topk(most).indices.tolist(), *ours.topk(1).indices.tolist()]
        positions = tuple(dict.fromkeys(largest))
        return FarSample(
            self.kind.name,
            self._seen + row,
            *judged,
            positions,
            float_values=tuple(float(theirs[at]) for at in positions),
            values=tuple(float(ours[at]) for at in positions),
        )


def _rank(sample: FarSample) -> tuple[float, float]:
    """Changed predictions first, then the largest error."""
    return -(sample.changed or 0.0), -sample.relative_error
