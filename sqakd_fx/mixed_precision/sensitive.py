"""Activations, and weights of recurrent layers, that cost the outputs too much at 8 bits: left in float.

The error of an output is nearly the root of the sum of squares of what each quantizer alone costs it. Where that is
beyond the tolerance of the output, tensors are left in float, the most error for the least work first, until every
output is within its tolerance or the recipe's share of the work is spent. A tensor is in float where the layers and
sums that read it are, and the convolution or the sum that makes it. A weight of a recurrent layer takes no work: it is
larger in the file.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from sqakd_fx.diagnostics.wording import first_of
from sqakd_fx.frontend.output_kinds import OutputKind
from sqakd_fx.ir import meta
from sqakd_fx.ir.batches import rows
from sqakd_fx.ir.op_table import Kind, node_macs, op_of, shape_of
from sqakd_fx.ir.outputs import relative_errors, tensors_of
from sqakd_fx.ir.replay import Replay
from sqakd_fx.quant.batch_norm import AbsorbedBatchNorm, AffineBatchNorm, ChannelAffine
from sqakd_fx.quant.quantizer import Quantizer, quantizers_of
from sqakd_fx.recipe.keys import Override, Recipe

_SAMPLES = 8
_MOVES = (Kind.TRANSPARENT, Kind.JOINT, Kind.NOISE)
_LEAST_SHARE = 0.25
_NAMES_TOLD = 8
_ELEMENT = 48
"""Multiply-accumulates whose time float adds as much to as to reading and writing one element of a result.

`python benchmarks/float_work.py` measures it.
"""
_VALUES = 0.03
_SCORES = 0.06
_OTHERS = 0.12
"""A cosine of 0.993 to float."""


@dataclass(frozen=True)
class SensitiveTensor:
    """A quantizer of an 8-bit activation, or of a recurrent layer's weight, and what it alone costs.

    Attributes:
        name: of the quantizer.
        errors: of each unlike part of each output, relative to float, when only this tensor is on its grid.
        layers: work by override's name of the layers and sums that have to be in float for it; empty where it cannot
            be in float.
        is_weight: it is of a weight, which `layers` names.
    """

    name: str
    errors: tuple[float, ...]
    layers: Mapping[str, int]
    is_weight: bool = False

    @property
    def error(self) -> float:
        """Of the part that it costs most."""
        return max(self.errors, default=0.0)


@dataclass(frozen=True)
class Relief:
    """What was decided.

    Attributes:
        tensors: all that were measured.
        chosen: those that are left in float.
        layers: by override's name, what alone an activation costs the outputs because of which it is in float.
        weights: the same of the weights of recurrent layers.
        before, after: by unlike part of each output, the root of the sum of squared errors.
        tolerances: by part.
        share: of the work, what loses its integer kernel.
    """

    tensors: tuple[SensitiveTensor, ...]
    chosen: tuple[SensitiveTensor, ...]
    layers: Mapping[str, float]
    weights: Mapping[str, float]
    before: tuple[float, ...]
    after: tuple[float, ...]
    tolerances: tuple[float, ...]
    share: float

    @property
    def worst(self) -> int:
        """The part that is farthest from its tolerance before."""
        far = [error / wanted for error, wanted in zip(self.before, self.tolerances, strict=True)]
        return max(range(len(far)), key=far.__getitem__, default=0)

    def sentence(self, outputs: Sequence[OutputKind]) -> str:
        """One line for a run's notes."""
        worst = self.worst
        before, after, wanted = (x[worst] for x in (self.before, self.after, self.tolerances))
        causes, done = [], []
        if self.layers:
            causes.append("activations")
            done.append(
                f"{len(self.layers)} layers and sums read theirs in float "
                f"({self.share:.0%} of the work loses its integer kernel)"
            )
        if self.weights:
            causes.append("weights of recurrent layers")
            done.append(f"{len(self.weights)} weights stay in float")
        return (
            f"8-bit {' and '.join(causes)} cost output {_part_names(outputs)[worst]} {before:.1%}, "
            f"its tolerance is {wanted:.0%}: {' and '.join(done)}, which leaves {after:.1%}: "
            + first_of([*self.layers, *self.weights], _NAMES_TOLD)
        )


def tolerances_of(recipe: Recipe, outputs: Sequence[OutputKind]) -> tuple[float, ...]:
    """By unlike part of each output, the relative error that 8-bit activations may cost it.

    `auto` asks most of values, which are used as they are, and more of class scores, the largest of which decides, than
    of probabilities and embeddings.
    """
    natures = [nature for one in outputs for nature in one.natures]
    if recipe.tolerance != "auto":
        return (recipe.tolerance,) * len(natures)
    known = {"values": _VALUES, "several": _VALUES, "scores": _SCORES, "classes": _SCORES}
    return tuple(known.get(nature, _OTHERS) for nature in natures)


@torch.no_grad()
def with_positive_scores_as_values(
    outputs: Sequence[OutputKind], student: fx.GraphModule, batches: Iterable[tuple[Tensor, ...]]
) -> tuple[OutputKind, ...]:
    """Outputs of which nothing tells scores from values are values where all numbers on some samples are above zero.

    Scores of classes fall on both sides of it.
    """
    if all(one.natures != ("scores",) for one in outputs):
        return tuple(outputs)
    positive = [True] * len(outputs)
    with _in_float(quantizers_of(student)):
        for inputs in batches:
            found = [x for x in tensors_of(student(*_few(inputs))) if x.is_floating_point()]
            positive = [a and bool((x > 0).all()) for a, x in zip(positive, found, strict=True)]
    return tuple(
        replace(one, nature="values") if one.natures == ("scores",) and above else one
        for one, above in zip(outputs, positive, strict=True)
    )


@contextlib.contextmanager
def _in_float(quantizers: Mapping[str, Quantizer]) -> Iterator[None]:
    """Inside, no quantizer is enabled that is not enabled there."""
    enabled = {name: quantizer.enabled for name, quantizer in quantizers.items()}
    try:
        for quantizer in quantizers.values():
            quantizer.enabled = False
        yield
    finally:
        for name, quantizer in quantizers.items():
            quantizer.enabled = enabled[name]


def _few(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The last samples of a batch."""
    size = len(inputs[0])
    return rows(inputs, max(size - _SAMPLES, 0), size)


def _part_names(outputs: Sequence[OutputKind]) -> list[str]:
    """The output's name, with what the part is where the output joins several."""
    return [
        one.name if len(one.natures) == 1 else f"{one.name} ({nature})"
        for one in outputs
        for nature in one.natures
    ]


@torch.no_grad()
def measure_tensors(
    student: fx.GraphModule, batches: Iterable[tuple[Tensor, ...]]
) -> tuple[SensitiveTensor, ...]:
    """By what it alone costs, the worst first, every quantizer of an 8-bit activation or of a recurrent weight.

    Of each batch the last eight samples are used, since ranges were searched on the first of a batch: what a range is
    fitted to says too little of its error. The student is calibrated, and is as it was afterwards.
    """
    quantizers = quantizers_of(student)
    calls: dict[str, list[fx.Node]] = {}
    for node in student.graph.find_nodes(op="call_module", sort=True):
        quantizer = quantizers.get(str(node.target))
        if quantizer is None or quantizer.bits != 8:
            continue
        if quantizer.role == "activation" or _is_of_recurrence(node):
            calls.setdefault(str(node.target), []).append(node)
    squares: dict[str, list[float]] = {name: [] for name in calls}
    count = 0
    with _in_float(quantizers):
        replay = Replay(student)
        parts = meta.output_parts(student.graph.output_node())
        for inputs in batches:
            wanted = replay.remember(_few(inputs))
            count += 1
            for name, nodes in calls.items():
                quantizers[name].enabled = True
                errors = _errors(replay.again(nodes, replay.run_node), wanted, parts)
                quantizers[name].enabled = False
                before = squares[name] or [0.0] * len(errors)
                squares[name] = [a + b**2 for a, b in zip(before, errors, strict=True)]
    found = []
    for name, nodes in calls.items():
        alone = tuple(math.sqrt(total / max(count, 1)) for total in squares[name])
        of_weight = quantizers[name].role == "weight"
        layers = _weight_of(nodes) if of_weight else _in_float_for(student, nodes)
        found.append(SensitiveTensor(name, alone, layers, of_weight))
    return tuple(sorted(found, key=lambda tensor: -tensor.error))


def _errors(got: Any, wanted: Any, parts: Mapping[int, Sequence[int]]) -> list[float]:
    """Of every part of every floating-point output; 0 where it is not finite."""
    found = [error for errors in relative_errors(got, wanted, parts) for error in errors]
    return [error if math.isfinite(error) else 0.0 for error in found]


def _is_of_recurrence(call: fx.Node) -> bool:
    return any(map(meta.is_recurrent, call.users))


def _weight_of(calls: Sequence[fx.Node]) -> dict[str, int]:
    """A weight that is stored in float; no layer loses its integer kernel."""
    return {str(call.all_input_nodes[0].target): 0 for call in calls}


def _in_float_for(student: fx.GraphModule, calls: Sequence[fx.Node]) -> dict[str, int]:
    """The layers and sums that have to be in float for a tensor; none where that does not make it float."""
    modules = dict(student.named_modules())
    makers = dict.fromkeys(_maker(call, modules) for call in calls)
    needed = [node for node in makers if not _gives_floats(node, modules)]
    needed += _readers(calls, modules)
    if not all(_can_be_float(node, modules) for node in needed):
        return {}
    return {_override_name(node): _work(node) for node in needed}


def _gives_floats(node: fx.Node, modules: Mapping[str, Any]) -> bool:
    """Whether the runtime reads what an operation makes of codes as float: accumulators of products, averages."""
    op = op_of(node, modules)
    if meta.layer(node) is not None:
        return op is not None and not op.is_convolution
    return meta.arithmetic(node) is Kind.AVERAGE or not _is_on_codes(node, modules)


def _readers(calls: Sequence[fx.Node], modules: Mapping[str, Any]) -> list[fx.Node]:
    """What computes on the codes of a tensor, as they are or moved."""
    found: list[fx.Node] = []
    pending = [user for call in calls for user in call.users]
    seen: set[fx.Node] = set()
    for node in pending:  # which grows
        if node in seen:
            continue
        seen.add(node)
        op = op_of(node, modules)
        if _is_on_codes(node, modules):
            found.append(node)
        elif op is not None and op.kind in _MOVES:
            pending.extend(node.users)
    return found


def _is_on_codes(node: fx.Node, modules: Mapping[str, Any]) -> bool:
    return meta.is_integer(node) or isinstance(modules.get(str(node.target)), Quantizer)


def _can_be_float(node: fx.Node, modules: Mapping[str, Any]) -> bool:
    """Whether an override can name an operation: a layer, a sum, a product, an average, a BatchNorm."""
    if meta.layer(node) is not None or meta.arithmetic(node) is not None:
        return True
    module = modules.get(str(node.target))
    return isinstance(module, AffineBatchNorm) and not isinstance(module.batch_norm, ChannelAffine)


def _override_name(node: fx.Node) -> str:
    return meta.own_name(node) if meta.layer(node) is not None else node.name


def _maker(call: fx.Node, modules: Mapping[str, Any]) -> fx.Node:
    """What computes a quantized tensor, in front of its clips and the BatchNorm that is part of it."""
    node = call.all_input_nodes[0]
    while node.all_input_nodes:
        op = op_of(node, modules)
        clips = op is not None and op.kind is Kind.CLIP
        if not clips and not isinstance(modules.get(str(node.target)), AbsorbedBatchNorm):
            break
        node = node.all_input_nodes[0]
    return node


def choose(
    tensors: Sequence[SensitiveTensor], tolerances: Sequence[float], most: float, work: int
) -> Relief:
    """The tensors to leave in float: most squared error for the work first, within `most` of all `work`."""
    taken: dict[str, SensitiveTensor] = {}
    layers: dict[str, int] = {}
    candidates = [t for t in tensors if t.layers and (not t.is_weight or _counts(t, tolerances))]
    reached = _reachable(tensors, candidates, tolerances)

    def left_of() -> tuple[float, ...]:
        return _together([one for one in tensors if one.name not in taken], len(tolerances))

    before = left_of()
    while beyond := _beyond(left_of(), reached):
        best, most_worth, spent = None, 0.0, sum(layers.values())
        for tensor in candidates:
            more = _more_work(tensor, layers)
            if tensor.name in taken or spent + more > most * work:
                continue
            gain = sum((tensor.errors[k] / tolerances[k]) ** 2 for k in beyond)
            if gain / max(more, 1) > most_worth:
                best, most_worth = tensor, gain / max(more, 1)
        if best is None:
            break
        taken[best.name] = best
        layers.update(best.layers)
    return Relief(
        tuple(tensors),
        tuple(taken.values()),
        _because(one for one in taken.values() if not one.is_weight),
        _because(one for one in taken.values() if one.is_weight),
        before,
        left_of(),
        tuple(tolerances),
        sum(layers.values()) / max(work, 1),
    )


def _together(tensors: Sequence[SensitiveTensor], outputs: int) -> tuple[float, ...]:
    """By part, what tensors cost it together."""
    return tuple(math.sqrt(sum(one.errors[k] ** 2 for one in tensors)) for k in range(outputs))


def _reachable(
    tensors: Sequence[SensitiveTensor],
    candidates: Sequence[SensitiveTensor],
    tolerances: Sequence[float],
) -> tuple[float, ...]:
    """By part, its tolerance; where what cannot be in float costs more, that and the tolerance together.

    Work that is spent on the rest would be lost.
    """
    names = {one.name for one in candidates}
    floor = _together([one for one in tensors if one.name not in names], len(tolerances))
    return tuple(
        most if least <= most else math.hypot(least, most)
        for least, most in zip(floor, tolerances, strict=True)
    )


def _counts(tensor: SensitiveTensor, tolerances: Sequence[float]) -> bool:
    """Whether a weight, which takes no work, costs an output enough to be larger in the file."""
    pairs = zip(tensor.errors, tolerances, strict=True)
    return any(error > _LEAST_SHARE * most for error, most in pairs)


def _beyond(errors: Sequence[float], tolerances: Sequence[float]) -> list[int]:
    """The parts whose error is beyond their tolerance."""
    return [
        k for k, (error, most) in enumerate(zip(errors, tolerances, strict=True)) if error > most
    ]


def _more_work(tensor: SensitiveTensor, layers: Mapping[str, int]) -> int:
    return sum(macs for name, macs in tensor.layers.items() if name not in layers)


def _because(taken: Iterable[SensitiveTensor]) -> dict[str, float]:
    """By layer that is in float, the largest cost of a tensor that is left in float with it."""
    found: dict[str, float] = {}
    for tensor in taken:
        for name in tensor.layers:
            found[name] = max(tensor.error, found.get(name, 0.0))
    return found


def with_relief(recipe: Recipe, relief: Relief) -> Recipe:
    """The recipe with an override for each layer and sum that reads a sensitive tensor in float."""
    made = [
        _override(
            layer, "activations", f"an 8-bit activation here alone costs the outputs {error:.1%}"
        )
        for layer, error in relief.layers.items()
    ]
    made += [
        _override(weight, True, f"8 bits here alone cost the outputs {error:.1%}")
        for weight, error in relief.weights.items()
    ]
    return recipe.model_copy(update={"override": (*recipe.override, *made)})


def _override(name: str, in_float: bool | str, why: str) -> Override:
    return Override.model_validate({"match": name, "exact": True, "float": in_float, "why": why})


def total_work(student: fx.GraphModule) -> int:
    """Of all operations on codes: multiply-accumulates, and `_ELEMENT` for each element of a result."""
    computed = (node for node in student.graph.nodes if not meta.is_table(node))
    return sum(_work(node) for node in computed if meta.is_integer(node))


def _work(node: fx.Node) -> int:
    macs = node_macs(node) if meta.layer(node) is not None else 0
    return macs + _ELEMENT * math.prod(shape_of(node) or ())
