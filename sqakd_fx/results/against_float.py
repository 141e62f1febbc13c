"""The exported file against the float model, output by output, on unlabelled samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sqakd_fx.frontend.output_kinds import OutputKind
from sqakd_fx.ir.outputs import separated


@dataclass(frozen=True)
class OutputDistance:
    """One floating-point output of the file beside the float model's.

    Attributes:
        name: as the recipe calls it.
        nature: what the output was taken for.
        samples: how many were compared.
        agreement: share of equal predictions; None where there are no classes.
        cosine: mean over the samples of the cosine between both.
        relative_error: root of the mean squared difference over the root of the float output's mean square; of the
            worst of unlike parts that the output joins.
        noise_ratio: signal over noise in decibels, -20 log10(relative_error); None where both are equal.
    """

    name: str
    nature: str
    samples: int
    agreement: float | None
    cosine: float
    relative_error: float
    noise_ratio: float | None

    @property
    def has_classes(self) -> bool:
        return self.agreement is not None

    @property
    def words(self) -> str:
        """What counts for this output, with enough digits to tell a loss."""
        distance = f"cosine {self.cosine:.4f}, relative error {self.relative_error:.2%}"
        if self.noise_ratio is not None:
            distance += f", {self.noise_ratio:.1f} dB"
        if self.agreement is None:
            return distance
        share = f"same prediction {self.agreement:.2%}"
        return share if self.nature != "scores" else f"{share}, {distance}"


class Sums:
    """What is added up over the batches for one output."""

    def __init__(self, kind: OutputKind) -> None:
        self.kind = kind
        self.same = self.decisions = self.samples = 0
        self.cosines = 0.0
        self.noise = [0.0] * max(len(kind.parts), 1)
        self.signal = [0.0] * max(len(kind.parts), 1)

    def add(self, got: Tensor, wanted: Tensor) -> None:
        if self.kind.axis is not None:
            equal = got.argmax(self.kind.axis) == wanted.argmax(self.kind.axis)
            self.same += int(equal.sum())
            self.decisions += equal.numel()
        ours, theirs = (x.reshape(len(x), -1) if x.ndim else x.reshape(1, 1) for x in (got, wanted))
        self.samples += len(ours)
        pairs = zip(*(separated(x, self.kind.parts) for x in (got, wanted)), strict=True)
        for index, (a, b) in enumerate(pairs):
            self.noise[index] += float((a - b).square().sum())
            self.signal[index] += float(b.square().sum())
        self.cosines += float(torch.cosine_similarity(ours, theirs).sum())

    def result(self) -> OutputDistance:
        sums = zip(self.noise, self.signal, strict=True)
        error = max(math.sqrt(n / s) if s else float(n > 0) for n, s in sums)
        return OutputDistance(
            self.kind.name,
            self.kind.nature,
            self.samples,
            self.same / self.decisions if self.decisions else None,
            self.cosines / max(self.samples, 1),
            error,
            -20 * math.log10(error) if error else None,
        )
