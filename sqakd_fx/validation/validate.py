"""Prove that an exported model computes what the trained graph computes.

Three ways: trained graph, integer program in PyTorch, ONNX Runtime with optimization off and full.
Differences are counted in codes at every quantized tensor, one operation at a time: each gets the
integer program's codes as its input, so that a rounding difference is seen where it is made and
not again behind it. Predictions are compared end to end. The runtime's own optimized graph says what
runs on integer kernels. Sessions have default options; that these are exact on every processor is proved from the
file (`pair_sums.py`). A recipe that asks for all of INT8 asks for a processor that is: there, sessions with exact
products are judged as well, and those with default options where this processor is one.
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, fx

from sqakd_fx.diagnostics.batch_errors import batch_named
from sqakd_fx.ir import meta
from sqakd_fx.ir.batches import moved, rows
from sqakd_fx.ir.outputs import tensors_of
from sqakd_fx.ir.tensor_names import quantized_names
from sqakd_fx.runtime.external_data import require_own_data
from sqakd_fx.runtime.fusion import Fusion, fusion_report
from sqakd_fx.runtime.session import CPU
from sqakd_fx.targets import TARGETS
from sqakd_fx.validation.code_shifts import code_shifts
from sqakd_fx.validation.pair_sums import PairSum, pair_sums
from sqakd_fx.validation.parity import TensorParity
from sqakd_fx.validation.preprocessing import (
    behind_preprocessing,
    preprocessing_nodes,
    wrong_preprocessing,
)
from sqakd_fx.validation.runs import Run, runs_of
from sqakd_fx.validation.sections import Section, cut
from sqakd_fx.validation.stored_values import differing_values
from sqakd_fx.validation.target_rules import TargetFile, broken_rules
from sqakd_fx.validation.trained_parity import Lockstep, quantizers_met
from sqakd_fx.validation.verdict import RuntimeParity, Validation, differences
from sqakd_fx.validation.whole_outputs import Predictions, relative_errors

_SAMPLES_AT_ONCE = 32
_CODES_AT_ONCE = 1 << 27
_CODES_IN_ALL = 1 << 25
_LEAST_BY_CODE = 8
"""Samples, of however many codes."""

OnAnswers = Callable[[tuple[Tensor, ...], list[Tensor], list[Tensor]], None]
"""Takes inputs, and what the trained graph and the file return for them."""


def validate(
    student: fx.GraphModule,
    lowered: fx.GraphModule,
    model: Path,
    batches: Iterable[tuple[Tensor, ...]],
    class_axes: Mapping[int, int] | None = None,
    runtime: str = "onnxruntime",
    on_answers: OnAnswers = lambda inputs, student, file: None,
) -> Validation:
    """Compare on `batches` (inputs in the graph's order), at most 32 samples at a time.

    Every quantized tensor is compared until 2^25 codes are, of all tensors together, and on 8 samples at least; samples
    behind these are compared by what the trained graph and the file return. With `runtime="openvino"` OpenVINO
    runs the file as well.

    `class_axes` has the axis of the classes by output; None where the shape of the first output tells it. Codes are
    held until the last section of the model that reads them has run. `on_answers` is told of each part of a batch what
    the trained graph and the file, in a session on the CPU with full optimization, return for it.

    Raises:
        ParityError: the runtime refuses the model, or a stored tensor lies outside its folder.
        SourceError: the model does not take a batch.
    """
    require_own_data(model)
    with tempfile.TemporaryDirectory() as folder:
        fusion = fusion_report(model, Path(folder))
    file = TargetFile(model)
    target = file.target
    sums = pair_sums(model) if TARGETS[target].adds_pairs else ()
    full_range = _asks_for_full_range(student) and any(pair.overflows for pair in sums)
    takes_bytes = bool(preprocessing_nodes(file.nodes))
    wrong: list[str] = []
    with behind_preprocessing(model) if takes_bytes else nullcontext(model) as behind:
        runs = runs_of(behind, full_range, runtime)
        comparison = _Comparison(student.eval(), lowered, runs, class_axes)
        whole = _in_parts(batches, comparison.fixed_batch or _SAMPLES_AT_ONCE)
        parts = (part for inputs in whole for part in comparison.parts(inputs))
        for index, inputs in enumerate(parts):
            on_cpu = tuple(x.cpu() for x in inputs)
            on_answers(on_cpu, *comparison.add(on_cpu))
            if takes_bytes and not index:
                wrong = wrong_preprocessing(model, on_cpu)
        result = replace(comparison.result(fusion, sums, full_range), target=target)
        differing = differing_values(lowered, behind)
    failures = (
        *broken_rules(file, target),
        *wrong,
        *differing,
        *comparison.missing_tensors(),
        *(pair.sentence() for pair in sums if pair.overflows and not full_range),
        *differences(result),
    )
    return replace(result, failures=failures)


def _asks_for_full_range(student: fx.GraphModule) -> bool:
    layers = (meta.layer(node) for node in student.graph.nodes)
    return any(layer is not None and layer.weight_range == "full" for layer in layers)


class _Comparison:
    """The trained graph, the integer program and the runtime on the same batches, with their differences so far."""

    def __init__(
        self,
        student: fx.GraphModule,
        lowered: fx.GraphModule,
        runs: list[Run],
        class_axes: Mapping[int, int] | None,
    ) -> None:
        self.lowered, self.runs = lowered, runs
        self.codes_left = float(_CODES_IN_ALL)
        self.model = runs[0].model
        self.deployed = next(
            r for r in runs if (r.provider, r.label, r.judged) == (CPU, "full", True)
        )
        given = onnx.load(str(self.model), load_external_data=False).graph.input
        self.inputs = [i.name for i in given]
        sizes = [i.type.tensor_type.shape.dim for i in given]
        self.fixed_batch = next((axes[0].dim_value for axes in sizes if axes), None) or None
        self.device = next((p.device for p in student.parameters()), torch.device("cpu"))
        self.names = quantized_names(lowered)
        shifts = code_shifts(lowered, self.names, self.model)
        for run in runs:
            run.shifts = shifts
        self.met = quantizers_met(lowered, self.names)
        self.lockstep = Lockstep(student)
        self.sections: list[Section] = []
        self.trained = _Agreement(class_axes)
        self.whole = [_Agreement(class_axes) for _ in self.runs]
        self.samples = self.samples_by_code = 0
        self.codes_of_sample = 0.0

    def parts(self, inputs: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
        """The samples of a batch that are compared by code, and those that are not; each to be given to `add`.

        Raises:
            SourceError: the model does not take the batch.
        """
        size = len(inputs[0])
        if not self.sections:
            with batch_named("a batch to validate on", inputs):
                self._open(inputs)
        by_code = math.ceil(self.codes_left / max(self.codes_of_sample, 1))
        by_code = max(by_code, _LEAST_BY_CODE - self.samples_by_code, 0)
        if self.fixed_batch or by_code >= size or not by_code:
            yield inputs
        else:
            yield rows(inputs, 0, by_code)
            yield rows(inputs, by_code, size)

    def _open(self, inputs: tuple[Tensor, ...]) -> None:
        size = len(inputs[0])
        least = rows(inputs, 0, self.fixed_batch or 1)
        counts = _code_counts(self.lowered, least, self.names, size)
        self.sections = cut(self.model, counts, _CODES_AT_ONCE)
        self.codes_of_sample = sum(counts.values()) / size
        for run in self.runs:
            run.open(self.sections)

    def add(self, inputs: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
        """Compare on a batch, and give what the trained graph and the file return for it.

        Raises:
            SourceError: the model does not take the batch.
        """
        feeds = {name: x.numpy() for name, x in zip(self.inputs, inputs, strict=True)}
        with batch_named("a batch to validate on", inputs), torch.no_grad():
            self.samples += len(inputs[0])
            if self.codes_left > 0 or self.samples_by_code < _LEAST_BY_CODE:
                return self._add_by_code(inputs, feeds)
            wanted = tensors_of(self.lockstep.run(*moved(inputs, self.device)))
        wanted = [t.cpu() for t in wanted]
        got = [torch.from_numpy(y) for y in self.deployed.whole(None, feeds)]
        agreement = self.whole[self.runs.index(self.deployed)]
        agreement.predictions.add(got, wanted)
        return wanted, got

    def _add_by_code(
        self, inputs: tuple[Tensor, ...], feeds: Mapping[str, Any]
    ) -> tuple[list[Tensor], list[Tensor]]:
        def check(index: int, codes: Mapping[str, Tensor]) -> None:
            for run in self.runs:
                run.check(index, codes, feeds)

        on_device = moved(inputs, self.device)
        self.lockstep.begin(on_device)
        recorder = _Recorder(
            self.lowered, self.names, self.sections, check, self.met, self.lockstep
        )
        reference = tensors_of(recorder.run(*inputs))
        ending = [t.cpu() for t in tensors_of(self.lockstep.finish())]
        wanted = [t.cpu() for t in tensors_of(self.lockstep.run(*on_device))]
        answered: list[Tensor] = []
        self.samples_by_code += len(inputs[0])
        self.codes_left -= len(inputs[0]) * self.codes_of_sample
        self.trained.add(wanted, reference, reference)
        self.trained.add_ends(ending, reference)
        for run, agreement in zip(self.runs, self.whole, strict=True):
            got = [torch.from_numpy(y) for y in run.whole(None, feeds)]
            agreement.add(got, reference, wanted)
            agreement.add_ends(run.ends(feeds), reference)
            if run is self.deployed:
                answered = got
        return wanted, answered

    def result(self, fusion: Fusion, sums: tuple[PairSum, ...], full_range: bool) -> Validation:
        """All differences, without a verdict."""
        producers = _producers(self.model)
        return Validation(
            self.samples,
            self.samples_by_code,
            self.trained.difference,
            self.trained.errors,
            self.trained.predictions.share,
            self.trained.predictions.are_the_same,
            _parities(self.lockstep.counts.items(), producers),
            tuple(
                RuntimeParity(
                    run.provider,
                    run.label,
                    run.exact_products,
                    _parities(run.in_order(), producers),
                    agreement.difference,
                    agreement.errors,
                    agreement.predictions.share,
                    agreement.predictions.are_the_same,
                    run.judged,
                )
                for run, agreement in zip(self.runs, self.whole, strict=True)
            ),
            fusion,
            sums,
            full_range,
        )

    def missing_tensors(self) -> list[str]:
        """A sentence for each quantized tensor that the file has not."""
        if not self.sections:
            return []
        seen = {name for section in self.sections for name in section.outputs}
        unseen = sorted(set(self.names.values()) - seen)
        return [f"{name}: the model has no such quantized tensor" for name in unseen]


def _parities(
    counts: Iterable[tuple[str, Counter[int]]], producers: Mapping[str, str]
) -> tuple[TensorParity, ...]:
    return tuple(
        TensorParity(name, producers.get(name, "?"), c.total(), dict(sorted(c.items())))
        for name, c in counts
    )


class _Agreement:
    """Outputs over all batches: from the same codes, and end to end."""

    def __init__(self, class_axes: Mapping[int, int] | None) -> None:
        self.difference = 0.0
        self.errors: tuple[float, ...] = ()
        self.predictions = Predictions(class_axes)

    def add(self, got: list[Tensor], values: list[Tensor], predictions: list[Tensor]) -> None:
        """End to end: differences of values from `values`, of predictions from those of `predictions`."""
        self.difference = max(self.difference, _largest(got, values))
        self.predictions.add(got, predictions)

    def add_ends(self, got: list[Tensor], wanted: list[Tensor]) -> None:
        """From the same codes: the largest relative error of each output."""
        errors = relative_errors(got, wanted)
        self.errors = tuple(map(max, self.errors or errors, errors))


class _Recorder(fx.Interpreter):
    """Runs the integer program; the trained graph and each section as soon as their codes are there."""

    def __init__(
        self,
        lowered: fx.GraphModule,
        names: Mapping[str, str],
        sections: Sequence[Section],
        check: Callable[[int, Mapping[str, Tensor]], None],
        met: Mapping[str, tuple[str, str]],
        lockstep: Lockstep,
    ) -> None:
        super().__init__(lowered)
        self.extra_traceback = False  # an error of ours is a sentence already
        self.names, self.sections, self.check = names, sections, check
        self.met, self.lockstep = met, lockstep
        self.codes: dict[str, Tensor] = {}
        known = set(names.values())
        self.missing = [known & {*s.outputs, *s.inputs} for s in sections]
        self.readers = Counter(
            name for s in sections for name in {*s.outputs, *s.inputs} if name in known
        )

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.met:
            self.lockstep.meet(*self.met[n.name], value)
        name = self.names.get(n.name)
        if name is not None and name in self.readers:
            self.codes[name] = value
            self._check_sections(name)
        return value

    def _check_sections(self, name: str) -> None:
        for index, (section, missing) in enumerate(zip(self.sections, self.missing, strict=True)):
            if name not in missing:
                continue
            missing.remove(name)
            if missing:
                continue
            self.check(index, self.codes)
            for read in {*section.outputs, *section.inputs} & self.codes.keys():
                self.readers[read] -= 1
                if not self.readers[read]:
                    del self.codes[read]


def _code_counts(
    lowered: fx.GraphModule, inputs: tuple[Tensor, ...], names: Mapping[str, str], samples: int
) -> dict[str, int]:
    """How many codes each quantized tensor has for a batch of so many `samples`, from a smaller one."""

    class Counting(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.name in names:
                counts[names[n.name]] = value.numel() * samples // len(inputs[0])
            return value

    counts: dict[str, int] = {}
    with torch.no_grad():
        Counting(lowered).run(*inputs)
    return counts


def _in_parts(batches: Iterable[tuple[Tensor, ...]], most: int) -> Iterator[tuple[Tensor, ...]]:
    """Batches of at most so many samples."""
    for inputs in batches:
        for start in range(0, len(inputs[0]), most):
            yield rows(inputs, start, start + most)


def _producers(model: Path) -> dict[str, str]:
    """Which operator makes each quantized tensor, looking through Clip and QuantizeLinear."""
    proto = onnx.load(str(model), load_external_data=False)
    by_output = {name: node for node in proto.graph.node for name in node.output}
    found = {}
    for name in by_output:
        node = by_output[name]
        while node.op_type in ("Clip", "QuantizeLinear") and node.input[0] in by_output:
            node = by_output[node.input[0]]
        found[name] = node.op_type
    return found


def _largest(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return max(
        (
            float((x.float() - y.float()).abs().max())
            for x, y in zip(a, b, strict=True)
            if x.numel()
        ),
        default=0.0,
    )
