"""Activations that cost the output too much at 8 bits: found after calibration, and left in float.

The error of the output is nearly the root of the sum of squares of what each quantizer alone costs it. Where it is
beyond the recipe's tolerance, layers read their sensitive inputs in float, the most error for the fewest
multiply-accumulates first, until the sum is within it or the recipe's share of the work is spent.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sqakd_fx.ir import meta
from sqakd_fx.ir.op_table import Kind, node_macs, op_of
from sqakd_fx.mixed_precision.replay import Replay
from sqakd_fx.mixed_precision.sensitivity import layer_name
from sqakd_fx.quant.quantizer import quantizers_of
from sqakd_fx.recipe import Override, Recipe

_SAMPLES = 8
_LEAST_SHARE = 0.02
"""Of all squared error: what is below is not worth an integer kernel."""
_MOVES = (Kind.TRANSPARENT, Kind.JOINT, Kind.NOISE)


@dataclass(frozen=True)
class SensitiveTensor:
    """An 8-bit activation quantizer and what it alone costs.

    Attributes:
        name: of the quantizer.
        error: of the outputs, relative to float, when only this tensor is on its grid.
        layers: overrides' names of the layers that read it; empty where something else reads it too.
        macs: multiply-accumulates of these layers.
    """

    name: str
    error: float
    layers: tuple[str, ...]
    macs: int


@dataclass(frozen=True)
class Relief:
    """What was decided: `before` and `after` are the root of the sum of squared errors."""

    tensors: tuple[SensitiveTensor, ...]
    chosen: tuple[SensitiveTensor, ...]
    before: float
    after: float
    share: float

    @property
    def sentence(self) -> str:
        """One line for a run's notes."""
        layers = [layer for tensor in self.chosen for layer in tensor.layers]
        return (
            f"8-bit activations cost the outputs {self.before:.1%}: {len(layers)} layers read theirs in float "
            f"({self.share:.0%} of the multiply-accumulates lose their integer kernel), which leaves {self.after:.1%}: "
            + ", ".join(layers)
        )


@torch.no_grad()
def measure_tensors(
    student: fx.GraphModule, batches: Iterable[tuple[Any, ...]]
) -> tuple[SensitiveTensor, ...]:
    """Every 8-bit activation quantizer of a calibrated student, by what it alone costs; the worst first.

    Of each batch the first eight samples are used. The student is as it was afterwards.
    """
    quantizers = quantizers_of(student)
    enabled = {name: quantizer.enabled for name, quantizer in quantizers.items()}
    calls: dict[str, list[fx.Node]] = {}
    for node in student.graph.find_nodes(op="call_module", sort=True):
        quantizer = quantizers.get(str(node.target))
        if quantizer is not None and quantizer.role == "activation" and quantizer.bits == 8:
            calls.setdefault(str(node.target), []).append(node)
    squares = dict.fromkeys(calls, 0.0)
    count = 0
    try:
        for quantizer in quantizers.values():
            quantizer.enabled = False
        replay = Replay(student)
        for inputs in batches:
            few = tuple(x[:_SAMPLES] if isinstance(x, Tensor) and x.ndim else x for x in inputs)
            wanted = replay.remember(few)
            count += 1
            for name, nodes in calls.items():
                quantizers[name].enabled = True
                squares[name] += relative_error(replay.again(nodes, replay.run_node), wanted) ** 2
                quantizers[name].enabled = False
    finally:
        for name, quantizer in quantizers.items():
            quantizer.enabled = enabled[name]
    found = [
        SensitiveTensor(name, math.sqrt(squares[name] / max(count, 1)), *_readers(student, nodes))
        for name, nodes in calls.items()
    ]
    return tuple(sorted(found, key=lambda tensor: -tensor.error))


def relative_error(got: Any, wanted: Any) -> float:
    """The largest relative error of the floating-point outputs."""
    pairs = zip(torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(wanted))
    errors = [
        float((a - b).detach().norm() / b.detach().norm().clamp_min(1e-12))
        for a, b in pairs
        if isinstance(b, Tensor) and b.is_floating_point() and a.shape == b.shape
    ]
    finite = [error for error in errors if math.isfinite(error)]
    return max(finite, default=0.0)


def _readers(student: fx.GraphModule, calls: Sequence[fx.Node]) -> tuple[tuple[str, ...], int]:
    """The layers with a weight that read a tensor, and their work; none where anything else reads it."""
    modules = dict(student.named_modules())
    pending = [user for call in calls for user in call.users]
    layers: dict[fx.Node, None] = {}
    while pending:
        node = pending.pop()
        op = op_of(node, modules)
        if op is not None and op.kind in _MOVES:
            pending.extend(node.users)
        elif op is not None and op.is_linear and meta.layer(node) is not None:
            layers[node] = None
        elif op is None or op.kind is not Kind.SHAPE:
            return (), 0
    return tuple(dict.fromkeys(map(layer_name, layers))), sum(map(node_macs, layers))


def choose(tensors: Sequence[SensitiveTensor], tolerance: float, most: float, work: int) -> Relief:
    """The tensors to leave in float: most squared error for the work first, within `most` of all `work`."""
    energy = {tensor.name: tensor.error**2 for tensor in tensors}
    before = left = sum(energy.values())
    chosen: list[SensitiveTensor] = []
    spent = 0
    worth = sorted((t for t in tensors if t.layers), key=lambda t: -energy[t.name] / max(t.macs, 1))
    for tensor in worth:
        if left <= tolerance**2:
            break
        if spent + tensor.macs <= most * work:
            chosen.append(tensor)
            spent += tensor.macs
            left -= energy[tensor.name]
    after = math.sqrt(max(left, 0.0))
    return Relief(tuple(tensors), tuple(chosen), math.sqrt(before), after, spent / max(work, 1))


def with_relief(recipe: Recipe, relief: Relief) -> Recipe:
    """The recipe with an override for each layer that reads a sensitive tensor in float."""
    made = [
        Override.model_validate(
            {
                "match": re.sub(r"([*?[])", r"[\1]", layer),
                "float": "activations",
                "why": f"at 8 bits its input alone costs the outputs {tensor.error:.1%}",
            }
        )
        for tensor in relief.chosen
        for layer in tensor.layers
    ]
    return recipe.model_copy(update={"override": (*recipe.override, *made)})


def total_work(student: fx.GraphModule) -> int:
    """Multiply-accumulates of all quantized layers."""
    return sum(node_macs(n) for n in student.graph.nodes if meta.layer(n) is not None)
