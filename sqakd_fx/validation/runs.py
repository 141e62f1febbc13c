"""What runs an exported file: one runtime at one level of optimization, on the whole file and on its sections."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sqakd_fx.runtime.openvino import OpenVinoModel
from sqakd_fx.runtime.session import CPU, execute, overflows, providers, session
from sqakd_fx.validation.code_shifts import Shift, as_stored, as_trained
from sqakd_fx.validation.parity import count_steps
from sqakd_fx.validation.sections import Section, given

Compute = Callable[[Sequence[str] | None, Mapping[str, Any]], list[np.ndarray[Any, Any]]]
"""The outputs of these names, or all, of these inputs."""
OPENVINO = "OpenVINO"


class Run:
    """One runtime at one optimization level: the whole model, its sections, and counted differences.

    `load` makes what computes a model; of one given as bytes, external data lies in the folder.
    """

    def __init__(
        self,
        provider: str,
        label: str,
        load: Callable[[Path | bytes, Path | None], Compute],
        model: Path,
        *,
        exact_products: bool = False,
        judged: bool = True,
    ) -> None:
        self.provider, self.label, self.model = provider, label, model
        self.exact_products, self.judged = exact_products, judged
        self.load = load
        self.whole = load(model, None)
        self.sections: list[tuple[Section, Compute]] = []
        self.counts: dict[str, Counter[int]] = {}
        self.made: list[Tensor] = []
        self.shifts: Mapping[str, Shift] = {}

    def open(self, sections: Sequence[Section]) -> None:
        folder = self.model.absolute().parent
        self.sections = [(section, self.load(section.model, folder)) for section in sections]

    def ends(self, feeds: Mapping[str, Any]) -> list[Tensor]:
        """The model's outputs from the codes that the last section was given; from the inputs where it reads none."""
        if not self.sections[-1][0].inputs:
            self.check(len(self.sections) - 1, {}, feeds)
        return self.made

    def in_order(self) -> Iterator[tuple[str, Counter[int]]]:
        """The counted differences by tensor, in the order of the model."""
        for section, _ in self.sections:
            for name in section.outputs:
                if name in self.counts:
                    yield name, self.counts[name]

    def check(self, index: int, codes: Mapping[str, Tensor], feeds: Mapping[str, Any]) -> None:
        """Run one section on the integer program's codes and count what comes out different."""
        section, compute = self.sections[index]
        read = {
            given(name): as_stored(codes[name].numpy(), self.shifts.get(name))
            for name in section.inputs
        }
        floats = {n: feeds[n] for n in section.floats}
        made = compute(section.outputs, read | floats)
        if index == len(self.sections) - 1:
            self.made = [torch.from_numpy(y) for y in made]
            return
        for name, value in zip(section.outputs, made, strict=True):
            if name in codes:
                counter = self.counts.setdefault(name, Counter())
                count_steps(counter, as_trained(value, self.shifts.get(name)), codes[name].numpy())


def runs_of(model: Path, full_range: bool, runtime: str) -> list[Run]:
    """What runs the whole file; of one with all of INT8 also a session with exact products, and then `runtime`."""
    wrong = {(CPU, "full")} if full_range and overflows() else set()
    found = [
        Run(
            provider,
            label,
            _sessions(provider, label),
            model,
            judged=(provider, label) not in wrong,
        )
        for provider in providers()
        for label in ("off", "full")
    ]
    if full_range:
        load = _sessions(CPU, "full", exact_products=True)
        found.append(Run(CPU, "full", load, model, exact_products=True))
    if runtime == "openvino":
        found += [Run(OPENVINO, label, _openvino(label), model) for label in ("off", "full")]
    return found


def _sessions(
    provider: str, label: str, *, exact_products: bool = False
) -> Callable[[Path | bytes, Path | None], Compute]:
    def load(model: Path | bytes, data_folder: Path | None) -> Compute:
        running = session(
            model,
            provider=provider,
            optimize=label == "full",
            exact_products=exact_products,
            data_folder=data_folder,
        )
        return partial(execute, running)

    return load


def _openvino(label: str) -> Callable[[Path | bytes, Path | None], Compute]:
    return lambda model, data_folder: OpenVinoModel(model, low_precision=label == "full")
