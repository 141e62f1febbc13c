"""What the report draws of each quantized tensor: its histogram, its grid, and what the grid adds as noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sqakd_fx.ir.op_table import shape_of
from sqakd_fx.program import Program, distillation_teacher
from sqakd_fx.quant.quantizer import Quantizer

_SAMPLES = 8
_MOST_ELEMENTS = 2**26
_BINS = 96


@dataclass(frozen=True)
class TensorFacts:
    """One tensor that a quantizer reads.

    A weight is counted in steps of its grid, which each channel may have of its own size; an activation in its values.

    Attributes:
        quantizer: its name in the student.
        tensor: the node that makes the tensor.
        role: "weight" or "activation".
        lowest, step, levels: the grid, in the unit of the histogram.
        start, end, counts: the histogram; what lies outside is counted at its ends.
        clipped: share of the values outside the grid.
        grid_noise: signal over the noise of this grid alone, in decibels; None where there is no noise.
        distance: signal over the difference to the float model's tensor, in decibels; None where there is no such
            tensor, or no difference.
    """

    quantizer: str
    tensor: str
    role: str
    bits: int
    lowest: float
    step: float
    levels: int
    start: float
    end: float
    counts: tuple[int, ...]
    clipped: float
    grid_noise: float | None
    distance: float | None


@torch.no_grad()
def tensor_facts(program: Program, inputs: Sequence[Tensor]) -> list[TensorFacts]:
    """Every quantized tensor of the trained student, on at most eight samples of a batch, in graph order."""
    calls = _calls(program.student)
    samples = _affordable(calls)
    few = tuple(x[:samples] if x.ndim else x for x in inputs)
    floats: dict[str, Tensor] = {}
    if program.recipe.equalize == "off":
        names = {_tensor(node, calls) for node in calls}
        teacher = distillation_teacher(program)
        _Watched(teacher, lambda node: node.name in names, floats.__setitem__).run(*few)
    found: list[TensorFacts] = []

    def see(name: str, x: Tensor) -> None:
        for call in (node for node in calls if node.all_input_nodes[0].name == name):
            tensor = _tensor(call, calls)
            facts = _facts((str(call.target), tensor), calls[call], x, floats.get(tensor))
            if facts is not None:
                found.append(facts)

    read = {node.all_input_nodes[0].name for node in calls}
    _Watched(program.student, lambda node: node.name in read, see).run(*few)
    return found


def _affordable(calls: Iterable[fx.Node]) -> int:
    """How many samples keep the float model's tensors within a quarter of a gigabyte."""
    shapes = [shape_of(node.all_input_nodes[0]) or () for node in calls if _is_activation(node)]
    one = sum(math.prod(shape[1:]) for shape in shapes)
    return max(1, min(_SAMPLES, _MOST_ELEMENTS // max(one, 1)))


def _is_activation(call: fx.Node) -> bool:
    return call.all_input_nodes[0].op != "get_attr"


def _tensor(call: fx.Node, calls: Mapping[fx.Node, Quantizer]) -> str:
    """The node that makes what is quantized, perhaps with more bits before."""
    source = call.all_input_nodes[0]
    while source in calls:
        source = source.all_input_nodes[0]
    return source.name


def _calls(student: fx.GraphModule) -> dict[fx.Node, Quantizer]:
    modules = dict(student.named_modules())
    return {
        node: module
        for node in student.graph.nodes
        if node.op == "call_module"
        and isinstance(module := modules[str(node.target)], Quantizer)
        and module.enabled
    }


class _Watched(fx.Interpreter):
    """Runs a graph and shows the floating-point tensors of some nodes, by their names."""

    def __init__(
        self,
        graph_module: fx.GraphModule,
        wanted: Callable[[fx.Node], bool],
        see: Callable[[str, Tensor], None],
    ) -> None:
        super().__init__(graph_module)
        self.wanted, self.see = wanted, see

    def run_node(self, n: fx.Node) -> Any:
        made = super().run_node(n)
        if self.wanted(n) and isinstance(made, Tensor) and made.is_floating_point():
            self.see(n.name, made)
        return made


def _facts(
    names: tuple[str, str], quantizer: Quantizer, x: Tensor, wanted: Tensor | None
) -> TensorFacts | None:
    """None for a tensor without a finite value."""
    x = x.detach().float()
    made = quantizer(x)
    values, lowest, step = _in_unit(quantizer, x)
    values = values[torch.isfinite(values)]
    if not values.numel():
        return None
    levels = quantizer.levels.span + 1
    highest = lowest + step * (levels - 1)
    room = highest - lowest or step
    start = max(min(float(values.min()), lowest), lowest - room)
    end = min(max(float(values.max()), highest), highest + room)
    if not end > start:
        end = start + step
    outside = (values < lowest - step / 2) | (values > highest + step / 2)
    return TensorFacts(
        *names,
        quantizer.role,
        quantizer.bits,
        lowest,
        step,
        levels,
        start,
        end,
        tuple(int(n) for n in torch.histc(values.clamp(start, end), _BINS, start, end)),
        float(outside.float().mean()),
        _decibels(x, made),
        None if wanted is None or wanted.shape != x.shape else _decibels(wanted.float(), made),
    )


def _in_unit(quantizer: Quantizer, x: Tensor) -> tuple[Tensor, float, float]:
    """The values that the histogram counts, the lowest of the grid, and its step."""
    if quantizer.role == "activation":
        grid = quantizer.grid()
        step = float(grid.scale)
        return x, -grid.zero_point * step, step
    return quantizer.normalized(x), float(quantizer.interval(x).lowest), 1.0


def _decibels(signal: Tensor, other: Tensor) -> float | None:
    noise, power = float((other - signal).square().sum()), float(signal.square().sum())
    found = noise > 0 and power > 0 and math.isfinite(noise) and math.isfinite(power)
    return 10 * math.log10(power / noise) if found else None
