"""The verdict on an exported file: what was compared, and what of it is not the trained function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sqakd_fx.runtime.fusion import Fusion
from sqakd_fx.validation.pair_sums import PairSum
from sqakd_fx.validation.parity import TensorParity
from sqakd_fx.validation.runs import OPENVINO
from sqakd_fx.validation.whole_outputs import FLOAT_TOLERANCE

_CHANCE = 4
"""Codes of a small tensor that may lie on a tie."""
_ARITHMETIC = ("Add", "Mul", "Sub", "AveragePool", "GlobalAveragePool")


@dataclass(frozen=True)
class RuntimeParity:
    """A runtime against the integer program, at one optimization level.

    Attributes:
        output_difference: largest, end to end.
        output_errors: relative error of each output, from the integer program's codes.
        agreement: share of predictions that are the trained graph's, end to end.
        keeps_predictions: false where more change than ties and chance explain.
    """

    provider: str
    optimization: str
    exact_products: bool
    tensors: tuple[TensorParity, ...]
    output_difference: float
    output_errors: tuple[float, ...]
    agreement: float
    keeps_predictions: bool
    judged: bool = True

    @property
    def title(self) -> str:
        """What ran, in words."""
        if self.provider == OPENVINO:
            passes = "on" if self.optimization == "full" else "off"
            return f"OpenVINO CPU, low-precision passes {passes}"
        provider = self.provider.removesuffix("ExecutionProvider")
        asked = ", exact products asked for" if self.exact_products else ""
        return f"ONNX Runtime {provider}, optimization {self.optimization}{asked}"


@dataclass(frozen=True)
class Validation:
    """The verdict: `failures` is empty where the export is the trained function.

    `samples` were compared by what they return, the first `samples_by_code` of them in every quantized tensor as well.
    `trained` holds the trained graph against the integer program, tensor by tensor. `sizes` are those at which the file
    was compared beside the example's, where the recipe frees some. `full_range` where the file needs a
    processor with 8-bit dot products, or sessions with exact products, as its recipe asked.
    """

    samples: int
    samples_by_code: int
    student_difference: float
    student_errors: tuple[float, ...]
    student_agreement: float
    student_keeps_predictions: bool
    trained: tuple[TensorParity, ...]
    runtimes: tuple[RuntimeParity, ...]
    fusion: Fusion
    pair_sums: tuple[PairSum, ...]
    full_range: bool
    failures: tuple[str, ...] = field(default=())
    target: str = "onnxruntime"
    sizes: tuple[str, ...] = ()

    @property
    def deployed(self) -> RuntimeParity:
        """The judged run at full optimization that a deployer repeats."""
        return next(r for r in self.runtimes if r.optimization == "full" and r.judged)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"passed": not self.failures}


def differences(result: Validation) -> list[str]:
    """What is wrong, naming the first tensor that is out of bounds and the operation that made it.

    Unoptimized, the runtime adds in float32: a frequent pair of codes whose sum lies on a tie may change
    predictions, with each code within its step.
    """
    failures = []
    unlike = next((t for t in result.trained if departs_from_training(t)), None)
    if unlike is not None:
        failures.append(
            f"{unlike.name}, made by {unlike.producer}: the trained graph and the integer program differ "
            f"in {unlike.share_above(0):.3%} of its codes, by up to {unlike.largest} steps"
        )
    failures += _wrong_outputs("the integer program", result.student_errors)
    if not result.student_keeps_predictions:
        failures.append(
            f"the integer program and the trained graph agree on {result.student_agreement:.2%} "
            "of the predictions only"
        )
    for runtime in result.runtimes:
        if not runtime.judged:
            continue
        where = runtime.title
        broken = next((t for t in runtime.tensors if _is_broken(t, runtime.optimization)), None)
        if broken is not None:
            failures.append(
                f"{where}: {broken.name}, made by {broken.producer}, is off in "
                f"{broken.share_above(0):.3%} of its codes, by up to {broken.largest} steps"
            )
        failures += _wrong_outputs(where, runtime.output_errors)
        if not runtime.keeps_predictions and runtime.optimization == "full":
            failures.append(f"{where}: agrees on {runtime.agreement:.2%} of the predictions only")
    return failures


def _wrong_outputs(where: str, errors: Sequence[float]) -> list[str]:
    """A sentence for each output that differs by more than float rounding, from the same codes."""
    return [
        f"{where}: output {index} is off by {error:.3%} from the same codes"
        for index, error in enumerate(errors)
        if not error <= FLOAT_TOLERANCE
    ]


def departs_from_training(tensor: TensorParity) -> bool:
    """Beyond what float32 sums explain: 1 step where a sum lies on a tie, which a layer of few inputs meets often."""
    off = tensor.share_above(0)
    return tensor.largest > 1 or (off > 0.01 and off * tensor.elements > _CHANCE)


def _is_broken(tensor: TensorParity, optimization: str) -> bool:
    """Unoptimized within 1 step; optimized equal in 99.9 % of the codes, or all but ties, and within 1 step.

    The runtime's own integer sums and averages, in float32 of another order, may be 2 steps off.
    """
    if optimization == "off":
        return tensor.largest > 1
    if tensor.producer in _ARITHMETIC:
        return tensor.largest > 2 or tensor.share_above(1) > 0.001
    off = tensor.share_above(0)
    return tensor.largest > 1 or (off > 0.001 and off * tensor.elements > _CHANCE)
