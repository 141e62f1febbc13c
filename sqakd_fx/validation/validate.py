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

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import torch
from torch import Tensor, fx

from sqakd_fx.diagnostics.batch_errors import batch_named
from sqakd_fx.ir import meta
from sqakd_fx.ir.batches import moved, rows
from sqakd_fx.ir.outputs import tensors_of
from sqakd_fx.ir.tensor_names import quantized_names
from sqakd_fx.runtime.external_data import require_own_data
from sqakd_fx.runtime.fusion import Fusion, fusion_report
from sqakd_fx.runtime.session import CPU, execute, overflows, providers, session
from sqakd_fx.targets import TARGETS
from sqakd_fx.validation.code_shifts import as_stored, as_trained, code_shifts
from sqakd_fx.validation.pair_sums import PairSum, pair_sums
from sqakd_fx.validation.parity import TensorParity, count_steps
from sqakd_fx.validation.sections import Section, cut, given
from sqakd_fx.validation.stored_values import differing_values
from sqakd_fx.validation.target_rules import TargetFile, broken_rules
from sqakd_fx.validation.trained_parity import Lockstep, quantizers_met
from sqakd_fx.validation.verdict import RuntimeParity, Validation, differences
from sqakd_fx.validation.whole_outputs import Predictions, relative_errors

_SAMPLES_AT_ONCE = 32
_CODES_AT_ONCE = 1 << 27


def validate(
    student: fx.GraphModule,
    lowered: fx.GraphModule,
    model: Path,
    batches: Iterable[tuple[Tensor, ...]],
    class_axes: Mapping[int, int] | None = None,
) -> Validation:
    """Compare on `batches` (inputs in the graph's order), at most 32 samples at a time.

    `class_axes` has the axis of the classes by output; None where the shape of the first output tells it. Codes are
    held until the last section of the model that reads them has run.

    Raises:
        ParityError: the runtime refuses the model, or a stored tensor lies outside its folder.
        SourceError: the model does not take a batch.
    """
    require_own_data(model)
    with tempfile.TemporaryDirectory() as folder:
        fusion = fusion_report(model, Path(folder))
    file = TargetFile(model)
    target = str(file.target) if file.target in TARGETS else "onnxruntime"
    sums = pair_sums(model) if TARGETS[target].adds_pairs else ()
    full_range = _asks_for_full_range(student) and any(pair.overflows for pair in sums)
    comparison = _Comparison(student.eval(), lowered, _runs(model, full_range), class_axes)
    for inputs in _in_parts(batches, comparison.fixed_batch or _SAMPLES_AT_ONCE):
        comparison.add(tuple(x.cpu() for x in inputs))
    result = replace(comparison.result(fusion, sums, full_range), target=target)
    failures = (
        *broken_rules(file, target),
        *differing_values(lowered, model),
        *comparison.missing_tensors(),
        *(pair.sentence() for pair in sums if pair.overflows and not full_range),
        *differences(result),
    )
    return replace(result, failures=failures)


def _asks_for_full_range(student: fx.GraphModule) -> bool:
    layers = (meta.layer(node) for node in student.graph.nodes)
    return any(layer is not None and layer.weight_range == "full" for layer in layers)


def _runs(model: Path, full_range: bool) -> list[_Run]:
    """What runs the whole file; of one with all of INT8 also a session with exact products."""
    wrong = {(CPU, "full")} if full_range and overflows() else set()
    found = [
        _Run(provider, label, model, judged=(provider, label) not in wrong)
        for provider in providers()
        for label in ("off", "full")
    ]
    return [*found, _Run(CPU, "full", model, exact_products=True)] if full_range else found


class _Comparison:
    """The trained graph, the integer program and the runtime on the same batches, with their differences so far."""

    def __init__(
        self,
        student: fx.GraphModule,
        lowered: fx.GraphModule,
        runs: list[_Run],
        class_axes: Mapping[int, int] | None,
    ) -> None:
        self.student, self.lowered, self.runs = student, lowered, runs
        self.model = runs[0].model
        sizes = [i.shape[0] for i in runs[0].whole.get_inputs() if i.shape]
        self.fixed_batch = next((n for n in sizes if isinstance(n, int)), None)
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
        self.samples = 0

    def add(self, inputs: tuple[Tensor, ...]) -> None:
        """Compare on a batch; raises SourceError where the model does not take it."""
        if not self.sections:
            least = rows(inputs, 0, self.fixed_batch or 1)
            counts = _code_counts(self.lowered, least, self.names, len(inputs[0]))
            self.sections = cut(self.model, counts, _CODES_AT_ONCE)
            for run in self.runs:
                run.open(self.sections)
        asked = self.runs[0].whole.get_inputs()
        feeds = {i.name: x.numpy() for i, x in zip(asked, inputs, strict=True)}

        def check(index: int, codes: Mapping[str, Tensor]) -> None:
            for run in self.runs:
                run.check(index, codes, feeds)

        with batch_named("a batch to validate on", inputs), torch.no_grad():
            on_device = moved(inputs, self.device)
            self.lockstep.begin(on_device)
            recorder = _Recorder(
                self.lowered, self.names, self.sections, check, self.met, self.lockstep
            )
            reference = tensors_of(recorder.run(*inputs))
            ending = [t.cpu() for t in tensors_of(self.lockstep.finish())]
            wanted = [t.cpu() for t in tensors_of(self.student(*on_device))]
        self.samples += len(inputs[0])
        self.trained.add(wanted, reference, reference)
        self.trained.add_ends(ending, reference)
        for run, agreement in zip(self.runs, self.whole, strict=True):
            got = [torch.from_numpy(y) for y in execute(run.whole, None, feeds)]
            agreement.add(got, reference, wanted)
            agreement.add_ends(run.ends(feeds), reference)

    def result(self, fusion: Fusion, sums: tuple[PairSum, ...], full_range: bool) -> Validation:
        """All differences, without a verdict."""
        producers = _producers(self.model)
        return Validation(
            self.samples,
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


class _Run:
    """One provider at one optimization level: the whole model, its sections, and counted differences."""

    def __init__(
        self,
        provider: str,
        label: str,
        model: Path,
        *,
        exact_products: bool = False,
        judged: bool = True,
    ) -> None:
        self.provider, self.label, self.model = provider, label, model
        self.exact_products, self.judged = exact_products, judged
        self.whole = self._session(model)
        self.sections: list[tuple[Section, ort.InferenceSession]] = []
        self.counts: dict[str, Counter[int]] = {}
        self.made: list[Tensor] = []
        self.shifts: Mapping[str, int] = {}

    def open(self, sections: Sequence[Section]) -> None:
        self.sections = [
            (section, self._session(section.model, self.model.absolute().parent))
            for section in sections
        ]

    def _session(
        self, model: Path | bytes, data_folder: Path | None = None
    ) -> ort.InferenceSession:
        return session(
            model,
            provider=self.provider,
            optimize=self.label == "full",
            exact_products=self.exact_products,
            data_folder=data_folder,
        )

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
        section, running = self.sections[index]
        read = {
            given(name): as_stored(codes[name].numpy(), self.shifts.get(name))
            for name in section.inputs
        }
        floats = {n: feeds[n] for n in section.floats}
        made = execute(running, section.outputs, read | floats)
        if index == len(self.sections) - 1:
            self.made = [torch.from_numpy(y) for y in made]
            return
        for name, value in zip(section.outputs, made, strict=True):
            if name in codes:
                counter = self.counts.setdefault(name, Counter())
                count_steps(counter, as_trained(value, self.shifts.get(name)), codes[name].numpy())


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
