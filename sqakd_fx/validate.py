"""Prove that an exported model computes what the trained graph computes.

Three ways: trained graph, integer program in PyTorch, ONNX Runtime with optimisation off and full.
Differences are counted in codes at every quantized tensor, one operation at a time: each gets the
integer program's codes as its input, so that a rounding difference is seen where it is made and
not again behind it. Predictions are compared end to end. The runtime's own optimised graph says what
runs on integer kernels.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import Tensor, fx

from sqakd_fx.compiler import tensors_of
from sqakd_fx.errors import ParityError
from sqakd_fx.losses import class_axis
from sqakd_fx.stored_values import differing_values, file_names

_INTEGER = ("QLinear", "QGemm", "QAttention", "MatMulInteger", "ConvInteger", "DynamicQuantize")
_HEAVY = (
    "Conv",
    "ConvTranspose",
    "Gemm",
    "MatMul",
    "FusedConv",
    "FusedMatMul",
    "FusedGemm",
    "Add",
    "Mul",
)
_GIVEN = "@given"
_SAMPLES_AT_ONCE = 32
_ARITHMETIC = ("Add", "Mul", "Sub", "AveragePool", "GlobalAveragePool")


@dataclass(frozen=True)
class TensorParity:
    """Differences of one quantized tensor, in codes: histogram of |difference| to count."""

    name: str
    producer: str
    elements: int
    histogram: dict[int, int]

    @property
    def largest(self) -> int:
        return max((step for step, count in self.histogram.items() if count), default=0)

    def share_above(self, steps: int) -> float:
        """Share of elements more than `steps` codes off."""
        return sum(c for s, c in self.histogram.items() if s > steps) / max(self.elements, 1)


@dataclass(frozen=True)
class RuntimeParity:
    """ONNX Runtime against the integer program, at one optimisation level."""

    provider: str
    optimisation: str
    tensors: tuple[TensorParity, ...]
    output_difference: float
    agreement: float

    @property
    def first_divergence(self) -> TensorParity | None:
        return next((t for t in self.tensors if t.largest > 0), None)


@dataclass(frozen=True)
class Fusion:
    """What the runtime's own optimised graph runs in integers, and what in float, and why."""

    integer: dict[str, int]
    float_heavy: tuple[str, ...]
    reasons: dict[str, str]
    other: dict[str, int]


@dataclass(frozen=True)
class Validation:
    """The verdict: `failures` is empty where the export is the trained function."""

    samples: int
    student_difference: float
    student_agreement: float
    runtimes: tuple[RuntimeParity, ...]
    fusion: Fusion
    failures: tuple[str, ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"passed": not self.failures}


def session(
    model: Path | bytes,
    *,
    provider: str = "CPUExecutionProvider",
    optimise: bool = True,
    threads: int = 0,
    optimised_to: Path | None = None,
) -> ort.InferenceSession:
    """An ONNX Runtime session; raises ParityError where the runtime refuses the model."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    if optimised_to is not None:
        options.optimized_model_filepath = str(optimised_to)
    try:
        return ort.InferenceSession(
            str(model) if isinstance(model, Path) else model, options, providers=[provider]
        )
    except Exception as error:
        first = str(error).strip().splitlines()[0]
        raise ParityError(f"ONNX Runtime refuses the model: {first}") from error


def providers() -> list[str]:
    """Execution providers to validate on: CPU, and CUDA where a session really gets it."""
    found = ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" in ort.get_available_providers() and torch.cuda.is_available():
        found.insert(0, "CUDAExecutionProvider")
    return found


def validate(
    student: fx.GraphModule,
    lowered: fx.GraphModule,
    model: Path,
    batches: Iterable[tuple[Tensor, ...]],
) -> Validation:
    """Compare on `batches` (inputs in the graph's order), a batch at a time.

    Raises:
        ParityError: the runtime refuses the model.
    """
    student = student.eval()
    names = file_names(lowered)
    with tempfile.TemporaryDirectory() as folder:
        fusion = fusion_report(model, Path(folder))
        probing, outputs = _piecewise(model)
        sessions = [
            (
                provider,
                label,
                session(model, provider=provider, optimise=label == "full"),
                session(probing, provider=provider, optimise=label == "full"),
            )
            for provider in providers()
            for label in ("off", "full")
        ]
        counters: list[dict[str, Counter[int]]] = [{} for _ in sessions]
        differences = [0.0] * len(sessions)
        agreeing = [0] * len(sessions)
        student_difference, student_agreeing, samples, decisions = 0.0, 0, 0, 0
        for inputs in _in_parts(batches):
            inputs = tuple(x.cpu() if isinstance(x, Tensor) else x for x in inputs)
            with torch.no_grad():
                device = next((p.device for p in student.parameters()), torch.device("cpu"))
                trained = tensors_of(student(*(x.to(device) for x in inputs)))
                reference, codes = _run_reference(lowered, inputs, names)
            samples += len(inputs[0])
            wanted = [t.cpu() for t in trained]
            student_difference = max(student_difference, _largest(wanted, reference))
            same, total = _same_decisions(wanted, reference)
            student_agreeing += same
            decisions += total
            for index, (_, _, whole, piecewise) in enumerate(sessions):
                feeds = {i.name: x.numpy() for i, x in zip(whole.get_inputs(), inputs, strict=True)}
                got = [torch.from_numpy(y) for y in whole.run(None, feeds)]
                differences[index] = max(differences[index], _largest(got, reference))
                same, _ = _same_decisions(got, wanted)
                agreeing[index] += same
                known = {f"{name}{_GIVEN}": c.numpy() for name, c in codes.items()}
                wants = {i.name for i in piecewise.get_inputs()}
                made = piecewise.run(
                    outputs, {k: v for k, v in (feeds | known).items() if k in wants}
                )
                for name, value in zip(outputs, made, strict=True):
                    if name in codes:
                        _count(counters[index].setdefault(name, Counter()), value, codes[name])
        producers = _producers(model)
        runtimes = tuple(
            RuntimeParity(
                provider,
                label,
                tuple(
                    TensorParity(
                        name, producers.get(name, "?"), sum(c.values()), dict(sorted(c.items()))
                    )
                    for name, c in counters[index].items()
                ),
                differences[index],
                agreeing[index] / max(decisions, 1),
            )
            for index, (provider, label, _, _) in enumerate(sessions)
        )
    result = Validation(
        samples, student_difference, student_agreeing / max(decisions, 1), runtimes, fusion
    )
    failures = (*differing_values(lowered, model), *_failures(result))
    return Validation(**(result.__dict__ | {"failures": failures}))


def _in_parts(batches: Iterable[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    """Batches of at most 32 samples: all codes of one part are held in memory at once."""
    for inputs in batches:
        size = len(inputs[0])
        for start in range(0, size, _SAMPLES_AT_ONCE):
            end = start + _SAMPLES_AT_ONCE
            yield tuple(
                x[start:end] if isinstance(x, Tensor) and x.ndim and len(x) == size else x
                for x in inputs
            )


def _failures(result: Validation) -> list[str]:
    """What is wrong, naming the first tensor that is out of bounds and the operation that made it."""
    failures = []
    if result.student_agreement < 0.999:
        failures.append(
            f"the integer program and the trained graph agree on {result.student_agreement:.2%} "
            "of the predictions only"
        )
    for runtime in result.runtimes:
        where = f"{runtime.provider}, optimisation {runtime.optimisation}"
        broken = next((t for t in runtime.tensors if _is_broken(t, runtime.optimisation)), None)
        if broken is not None:
            failures.append(
                f"{where}: {broken.name}, made by {broken.producer}, is off in "
                f"{broken.share_above(0):.3%} of its codes, by up to {broken.largest} steps"
            )
        if runtime.agreement < 0.999:
            failures.append(f"{where}: agrees on {runtime.agreement:.2%} of the predictions only")
    return failures


def _is_broken(tensor: TensorParity, optimisation: str) -> bool:
    """Unoptimised within 1 step; optimised equal in 99.9 % of the codes and within 1 step.

    The runtime's own integer sums and averages, in float32 of another order, may be 2 steps off.
    """
    if optimisation == "off":
        return tensor.largest > 1
    if tensor.producer in _ARITHMETIC:
        return tensor.largest > 2 or tensor.share_above(1) > 0.001
    return tensor.largest > 1 or tensor.share_above(0) > 0.001


# -- the pieces --------------------------------------------------------------------------------


class _Recorder(fx.Interpreter):
    """Runs the integer program and keeps the codes of its quantized tensors."""

    def __init__(self, lowered: fx.GraphModule, names: dict[str, str]) -> None:
        super().__init__(lowered)
        self.names = names
        self.codes: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.names:
            self.codes[self.names[n.name]] = value
        return value


def _run_reference(
    lowered: fx.GraphModule, inputs: Sequence[Any], names: dict[str, str]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    recorder = _Recorder(lowered, names)
    return tensors_of(recorder.run(*inputs)), recorder.codes


def _piecewise(model: Path) -> tuple[bytes, list[str]]:
    """The model cut at every quantized activation: its codes come in from outside and go out."""
    proto = onnx.load(str(model))
    constants = {i.name for i in proto.graph.initializer}
    names = [
        a.tensor_name
        for a in proto.graph.quantization_annotation
        if a.tensor_name not in constants and "_quantized" in a.tensor_name
    ]
    cut = {name: f"{name}{_GIVEN}" for name in names}
    for node in proto.graph.node:
        for index, name in enumerate(node.input):
            if name in cut:
                node.input[index] = cut[name]
    typed = {v.name: v for v in (*proto.graph.value_info, *proto.graph.output)}
    finals = {o.name for o in proto.graph.output}
    for name in names:
        known = typed.get(name) or onnx.helper.make_tensor_value_info(
            name, onnx.TensorProto.UINT8, None
        )
        given = onnx.ValueInfoProto()
        given.CopyFrom(known)
        given.name = cut[name]
        proto.graph.input.append(given)
        if name not in finals:
            proto.graph.output.append(known)
    return proto.SerializeToString(), names


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


def fusion_report(model: Path, folder: Path) -> Fusion:
    """Read the graph that ONNX Runtime itself made of the model at full optimisation."""
    target = folder / "optimised.onnx"
    session(model, optimised_to=target)
    proto = onnx.load(str(target), load_external_data=False)
    makers = {name: node.op_type for node in proto.graph.node for name in node.output}
    readers: dict[str, list[str]] = {}
    for node in proto.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.op_type)
    constants = {i.name for i in proto.graph.initializer}
    integer: Counter[str] = Counter()
    other: Counter[str] = Counter()
    heavy: dict[str, str] = {}
    for node in proto.graph.node:
        if node.op_type.startswith(_INTEGER):
            integer[node.op_type] += 1
        elif node.op_type in _HEAVY:
            heavy[f"{node.name or node.output[0]} ({node.op_type})"] = _why_float(
                node, makers, readers, constants
            )
        else:
            other[node.op_type] += 1
    return Fusion(dict(integer), tuple(heavy), heavy, dict(other))


def _why_float(
    node: onnx.NodeProto,
    makers: dict[str, str],
    readers: dict[str, list[str]],
    constants: set[str],
) -> str:
    """What keeps a node of the optimised graph from an integer kernel."""
    floats = [
        name
        for name in node.input
        if name and name not in constants and makers.get(name) != "DequantizeLinear"
    ]
    if floats:
        made = makers.get(floats[0])
        return (
            f"its input {floats[0]} is float, made by {made}"
            if made
            else (f"its input {floats[0]} is a float input of the model")
        )
    if any(name in constants for name in node.input):
        return "its weight or a constant is float"
    after = {reader for name in node.output for reader in readers.get(name, ["an output"])}
    if after != {"QuantizeLinear"}:
        return f"its output is read in float, by {', '.join(sorted(after))}"
    return "the runtime has no integer kernel for it in this form"


def _largest(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return max(
        (
            float((x.float() - y.float()).abs().max())
            for x, y in zip(a, b, strict=True)
            if x.numel()
        ),
        default=0.0,
    )


def _same_decisions(a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[int, int]:
    axis = class_axis(tuple(a[0].shape))
    if axis is None:
        return len(a[0]), len(a[0])
    same = a[0].argmax(dim=axis) == b[0].argmax(dim=axis)
    return int(same.sum()), same.numel()


def _count(counter: Counter[int], got: np.ndarray[Any, Any], wanted: Tensor) -> None:
    steps = np.abs(got.astype(np.int32) - wanted.numpy().astype(np.int32))
    values, counts = np.unique(steps, return_counts=True)
    counter.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))


def latency(model: Path, inputs: Sequence[Tensor], *, runs: int = 20, threads: int = 1) -> float:
    """Median milliseconds of one call."""
    running = session(model, threads=threads)
    feeds = {i.name: x.numpy() for i, x in zip(running.get_inputs(), inputs, strict=True)}
    running.run(None, feeds)
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        running.run(None, feeds)
        times.append(time.perf_counter() - started)
    return 1000 * float(np.median(times))
