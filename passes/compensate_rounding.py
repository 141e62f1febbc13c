"""Round weights so that later ones of a row make up for the rounding of earlier ones (GPTQ); no labels are needed.

    Before:  w̃ = nearest(w)
    After:   w̃ = nearest(w'),  where (w - w̃) H (w - w̃)ᵀ is smaller     H = E[x xᵀ]

w' takes the place of w, so that training goes on from there. A row that is not better by it stays as it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from sqakd_fx.errors import PassError
from sqakd_fx.ir import meta
from sqakd_fx.ir.op_table import Op, op_of
from sqakd_fx.ir.pass_manager import Note, Pass, PassResult
from sqakd_fx.ir.rewriting import constant_of
from sqakd_fx.quant.error_compensation import Rounding, compensated, row_errors
from sqakd_fx.quant.grid import along_axis
from sqakd_fx.quant.quantizer import Quantizer


@dataclass(frozen=True)
class CompensateRounding(Pass):
    """Round weights so that later ones of a row make up for the rounding of earlier ones.

    `moments` holds by layer E[x xᵀ] of what a row multiplies. `before` is given the float weights of what has changed.
    """

    name: ClassVar[str] = "compensate_rounding"

    moments: Mapping[str, Tensor] = field(default_factory=dict)
    before: dict[str, Tensor] = field(default_factory=dict)

    def requires(self, graph_module: fx.GraphModule) -> None:
        for name, module in graph_module.named_modules():
            if isinstance(module, Quantizer) and not module.enabled:
                raise PassError(f"the quantizer {name} has no range: calibrate the student first")

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        modules = dict(graph_module.named_modules())
        layers = {
            node: op
            for node in graph_module.graph.nodes
            if meta.has_quantized_weight(node)
            and (op := op_of(node, modules))
            and op.weight is not None
        }
        shared = Counter(_source(node, op).target for node, op in layers.items())
        notes: list[Note] = []
        for node, op in layers.items():
            if shared[_source(node, op).target] > 1:
                reason: str | None = "several layers read them"
            else:
                reason = self._compensate(graph_module, node, op, modules)
            if reason is not None:
                notes.append(Note(node.name, f"weights start on the nearest codes: {reason}"))
        return PassResult(graph_module, bool(self.before), tuple(notes))

    def ensures(self, result: PassResult) -> None:
        for name, value in result.graph_module.named_parameters():
            if not bool(torch.isfinite(value).all()):
                raise PassError(f"{name} is not finite")

    @torch.no_grad()
    def _compensate(
        self,
        graph_module: fx.GraphModule,
        node: fx.Node,
        op: Op,
        modules: Mapping[str, nn.Module],
    ) -> str | None:
        """Change one layer's weight; returns why it cannot be."""
        moment = self.moments.get(node.name)
        if moment is None:
            return "what it multiplies was not seen"
        quantizer = modules[str(_quantized(node, op).target)]
        weight = constant_of(graph_module, _source(node, op))
        assert isinstance(quantizer, Quantizer)
        assert weight is not None
        if quantizer.side.transform is not None:
            return f"{quantizer.family.name} transforms them"
        rows = weight.float().reshape(len(moment), -1, moment.shape[1])
        better = compensated(rows, moment, _nearest(quantizer, weight, len(moment)))
        better = better.reshape(weight.shape)
        nearest, other = quantizer(weight), quantizer(better)
        kept = row_errors((nearest - weight).reshape(rows.shape), moment)
        gained = row_errors((other - weight).reshape(rows.shape), moment) < kept
        mask = gained.reshape(-1, *[1] * (weight.ndim - 1))
        changed = torch.where(mask, better, weight)
        if not torch.equal(quantizer(changed), torch.where(mask, other, nearest)):
            return "their range follows them"
        if bool(gained.any()):
            self.before[node.name] = weight.clone()
            weight.copy_(changed)
        return None


def _quantized(node: fx.Node, op: Op) -> fx.Node:
    """The call of the quantizer of a layer's weight."""
    quantized = node.args[op.weight or 0]
    assert isinstance(quantized, fx.Node)
    return quantized


def _source(node: fx.Node, op: Op) -> fx.Node:
    """What reads a layer's weight in front of its quantizer."""
    return _quantized(node, op).all_input_nodes[0]


def _nearest(quantizer: Quantizer, weight: Tensor, groups: int) -> Rounding:
    """Rounding of one column of (groups, rows) by a quantizer of the weight."""
    at = quantizer.interval(weight.float())
    span, half = quantizer.levels.span, quantizer.levels.half

    def by_row(value: Tensor) -> Tensor:
        whole = along_axis(value, quantizer.axis, weight.ndim).expand(
            len(weight), *weight.shape[1:]
        )
        return whole.reshape(len(weight), -1)[:, 0].reshape(groups, -1)

    scale_in, offset, scale_out, lowest = map(by_row, at)
    return lambda column: (
        (torch.round(column / scale_in + offset).clamp(lowest, lowest + span) - half) * scale_out
    )
