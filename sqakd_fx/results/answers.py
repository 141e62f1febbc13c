"""What float model, student and file answer to the samples that are validated on: computed once, for all figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sqakd_fx.ir.outputs import tensors_of
from sqakd_fx.program import Program
from sqakd_fx.results.against_float import OutputDistance, Sums
from sqakd_fx.results.evaluate import plain_labels, scores, validation_batches
from sqakd_fx.results.farthest import FarSample, Farthest
from sqakd_fx.source.inputs import TrainingInputs
from sqakd_fx.source.source import Source

_COMPARED_SAMPLES = 512


class Answers:
    """Hands samples out, and takes what student and file made of them; the float model answers here.

    All outputs are kept where the samples have labels, by "float", "student" and "onnx"; else only how far the file is
    from the float model.
    """

    def __init__(self, source: Source, program: Program, inputs: TrainingInputs | None) -> None:
        self.source, self.program, self.inputs = source, program, inputs
        self.outputs: dict[str, list[list[Tensor]]] = {"float": [], "student": [], "onnx": []}
        self.labels: list[Any] = []
        self._sums = [Sums(kind) for kind in program.outputs]
        self._farthest = [Farthest(kind) for kind in program.outputs]
        self._compared = 0

    def batches(self) -> Iterator[tuple[Tensor, ...]]:
        """The samples, in the order in which `add` is to be told of them."""
        for batch, labels in validation_batches(self.source, self.program, self.inputs):
            self.labels.append(plain_labels(labels))
            yield batch

    def add(
        self, batch: Sequence[Tensor], student: Sequence[Tensor], file: Sequence[Tensor]
    ) -> None:
        """All tensors that the student and the file return for a batch, or for a part of one."""
        has_labels = self.labels[-1] is not None
        is_compared = self._compared < _COMPARED_SAMPLES
        if not has_labels and not is_compared:
            return
        with torch.no_grad():
            wanted = tensors_of(self.program.teacher(*batch))
        if is_compared:
            self._compared += len(batch[0])
            for one, far in zip(self._sums, self._farthest, strict=True):
                got, want = file[one.kind.index].double(), wanted[one.kind.index].double()
                one.add(got, want)
                far.add(got, want, batch[0])
        if has_labels:
            for name, made in (("float", wanted), ("student", student), ("onnx", file)):
                self.outputs[name].append([x.cpu() for x in made])

    def distances(self) -> tuple[OutputDistance, ...]:
        """Every floating-point output of the file beside the float model's, over the first 512 samples."""
        return tuple(one.result() for one in self._sums)

    def farthest(self) -> tuple[FarSample, ...]:
        """Of every output, the samples on which the file is farthest from the float model, of the same samples."""
        return tuple(sample for one in self._farthest for sample in one.samples)

    def accuracy(self) -> dict[str, float] | None:
        """Top-1 in percent, or the user's metric, by "float", "student" and "onnx"; None without labels.

        Raises:
            SourceError: the metric fails, or labels are not the class of each prediction.
        """
        if not self.outputs["float"]:
            return None
        return scores(self.source, self.program, self.outputs, self.labels)
