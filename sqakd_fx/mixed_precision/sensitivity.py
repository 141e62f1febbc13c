"""How much each layer alone costs: the divergence from the float model when only it is quantized.

The float activations of a batch are computed once and kept; for a layer, only what stands behind it is
computed again. Nothing is trained and no label is read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sqakd_fx.ir import meta
from sqakd_fx.ir.meta import LayerSettings
from sqakd_fx.ir.op_table import node_macs, op_of
from sqakd_fx.ir.replay import Replay
from sqakd_fx.ir.rewriting import constant_of
from sqakd_fx.plan.weight_codes import WeightCodes, weight_codes
from sqakd_fx.program import Program
from sqakd_fx.quant.quantizer import Quantizer
from sqakd_fx.recipe.keys import Recipe
from sqakd_fx.training.losses import distillation_loss


@dataclass(frozen=True)
class LayerSensitivity:
    """One weight tensor and the layers that use it.

    Attributes:
        name: what an override matches: the module path, or the node's name.
        parameters: elements of the weight; 0 for a product of two activations.
        macs: multiply-accumulates of one call on the example.
        weight_bits: what the recipe gives.
        source: the rule of the recipe that gave the bits.
        divergence: weight bits to the loss against the float model (KL at temperature 1 for class
            scores), mean over the samples.
    """

    name: str
    parameters: int
    macs: int
    weight_bits: int
    source: str
    divergence: dict[int, float]

    @property
    def is_fixed(self) -> bool:
        """True where the recipe itself sets this layer apart, so that a budget leaves it alone."""
        return not self.parameters or not self.source.startswith("recipe ")


@dataclass
class _Group:
    """Layers that share a weight, with their quantizers."""

    nodes: list[fx.Node]
    settings: LayerSettings
    weight: Tensor | None
    axis: int
    codes: WeightCodes
    quantizers: dict[tuple[str, int], Quantizer]


@torch.no_grad()
def measure_sensitivity(
    program: Program,
    recipe: Recipe,
    batches: Iterable[tuple[Tensor, ...]],
    *,
    candidates: Sequence[int] = (),
    on_layer: Callable[[int, int], None] = lambda done, total: None,
) -> list[LayerSensitivity]:
    """Every quantized layer, the most sensitive at the recipe's own bits first.

    `batches` are model inputs in the graph's order; activations are calibrated on the first.
    `candidates` are further weight bits to try.
    """
    groups = _groups(program)
    totals: dict[str, dict[int, float]] = {name: {} for name in groups}
    loss = distillation_loss(recipe.model_copy(update={"temperature": 1.0}))
    replay = Replay(program.teacher)
    count = 0
    for inputs in batches:
        wanted = replay.remember(inputs)
        weight = len(inputs[0])
        count += weight
        for index, (name, group) in enumerate(groups.items()):
            for bits in _bits_to_try(group, candidates):
                compute = functools.partial(
                    _quantized, replay, group=group, bits=bits, recipe=recipe
                )
                got = replay.again(group.nodes, compute)
                value = float(loss(got, wanted)) * weight
                totals[name][bits] = totals[name].get(bits, 0.0) + value
            on_layer(index + 1, len(groups))
    found = [
        LayerSensitivity(
            name,
            0 if group.weight is None else group.weight.numel(),
            sum(node_macs(node) for node in group.nodes),
            group.settings.weight_bits,
            group.settings.source,
            {bits: value / max(count, 1) for bits, value in sorted(totals[name].items())},
        )
        for name, group in groups.items()
    ]
    return sorted(found, key=lambda layer: -layer.divergence[layer.weight_bits])


def passes_needed(program: Program, candidates: Sequence[int] = ()) -> float:
    """What `measure_sensitivity` costs, in multiply-accumulates of full forward passes."""
    nodes = list(program.teacher.graph.nodes)
    macs = {node: node_macs(node) if node.all_input_nodes else 0 for node in nodes}
    spent = sum(macs.values())
    for group in _groups(program).values():
        behind: set[fx.Node] = set()
        for node in nodes:
            if node in group.nodes or any(source in behind for source in node.all_input_nodes):
                behind.add(node)
        spent += len(_bits_to_try(group, candidates)) * sum(macs[node] for node in behind)
    return spent / max(sum(macs.values()), 1)


def _bits_to_try(group: _Group, candidates: Sequence[int]) -> list[int]:
    own = group.settings.weight_bits
    return [own] if group.weight is None else sorted({own, *candidates})


def _groups(program: Program) -> dict[str, _Group]:
    """Layers by the weight they use, under the name of the first."""
    settings = {
        node.name: settings
        for node in program.student.graph.nodes
        if (settings := meta.layer(node)) is not None
    }
    modules = dict(program.teacher.named_modules())
    by_weight: dict[str, _Group] = {}
    names: dict[str, str] = {}
    for node in program.teacher.graph.nodes:
        op = op_of(node, modules)
        if node.name not in settings or op is None:
            continue
        weight = None if op.weight is None else node.args[op.weight]
        key = node.name if weight is None else str(weight.target)
        if key not in by_weight:
            tensor = constant_of(program.teacher, weight)
            codes = weight_codes(node, op, settings[node.name])
            by_weight[key] = _Group([], settings[node.name], tensor, op.channel_axis, codes, {})
            names[key] = meta.own_name(node)
        by_weight[key].nodes.append(node)
    return {names[key]: group for key, group in by_weight.items()}


def _quantized(replay: Replay, node: fx.Node, group: _Group, bits: int, recipe: Recipe) -> Any:
    """The layer's output with its inputs and its weight on their grids."""
    op = op_of(node, replay.modules)
    assert op is not None
    given, kwargs = replay.fetch_args_kwargs_from_env(node)
    args: list[Any] = list(given)
    for position in op.activations:
        quantizer = _quantizer(
            group,
            f"{node.name}.{position}",
            "activation",
            group.settings.activation_bits,
            args[position],
            recipe,
        )
        args[position] = quantizer(args[position])
    if op.weight is not None:
        weight = args[op.weight]
        args[op.weight] = _quantizer(group, "weight", "weight", bits, weight, recipe)(weight)
    return replay.call_function(node.target, tuple(args), kwargs)


def _quantizer(
    group: _Group, name: str, role: str, bits: int, x: Tensor, recipe: Recipe
) -> Quantizer:
    """The group's quantizer of this name and width, calibrated on the first tensor it sees."""
    key = (name, bits)
    if key not in group.quantizers:
        at = group.settings
        per_channel = role == "weight" and at.granularity == "channel"
        made = Quantizer(
            at.weight_family if role == "weight" else at.activation_family,
            role,
            bits,
            channels=x.shape[group.axis] if per_channel else None,
            axis=group.axis if per_channel else None,
            zero_in_grid=recipe.zero_in_grid,
            largest_code=group.codes.largest,
            paired=group.codes.paired,
            power_of_two=recipe.power_of_two,
        ).to(x.device)
        made.initialize(x, recipe.initialization)
        group.quantizers[key] = made.eval()
    return group.quantizers[key]
