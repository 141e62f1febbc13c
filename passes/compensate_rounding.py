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
from torch import Tensor, fx

from sqakd_fx.ir.pass_manager import Note, Pass, PassResult
from sqakd_fx.quant.error_compensation import Rounding, compensated, row_errors
from sqakd_fx.quant.quantized_layers import QuantizedLayer, quantized_layers, require_ranges
from sqakd_fx.quant.quantizer import Quantizer, on_grid


@dataclass(frozen=True)
class CompensateRounding(Pass):
    """Round weights so that later ones of a row make up for the rounding of earlier ones.

    `moments` holds by layer E[x xᵀ] of what a row multiplies. `before` is given the float weights of what has changed.
    """

    name: ClassVar[str] = "compensate_rounding"

    moments: Mapping[str, Tensor] = field(default_factory=dict)
    before: dict[str, Tensor] = field(default_factory=dict)

    def requires(self, graph_module: fx.GraphModule) -> None:
        require_ranges(graph_module)

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        layers = list(quantized_layers(graph_module))
        shared = Counter(layer.weight_name for layer in layers)
        notes: list[Note] = []
        for layer in layers:
            if shared[layer.weight_name] > 1:
                reason: str | None = "several layers read them"
            else:
                reason = self._compensate(layer)
            if reason is not None:
                sentence = f"weights start on the nearest codes: {reason}"
                notes.append(Note(layer.node.name, sentence))
        return PassResult(graph_module, bool(self.before), tuple(notes))

    def ensures(self, result: PassResult) -> None:
        result.require_finite()

    @torch.no_grad()
    def _compensate(self, layer: QuantizedLayer) -> str | None:
        """Change one layer's weight; returns why it cannot be."""
        moment = self.moments.get(layer.node.name)
        if moment is None:
            return "what it multiplies was not seen"
        quantizer, weight = layer.quantizer, layer.weight
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
            self.before[layer.node.name] = weight.clone()
            weight.copy_(changed)
        return None


def _nearest(quantizer: Quantizer, weight: Tensor, groups: int) -> Rounding:
    """Rounding of one column of (groups, rows) by a quantizer of the weight."""
    scale_in, offset, scale_out, lowest = (
        value.expand(len(weight)).reshape(groups, -1)
        for value in quantizer.interval(weight.float())
    )
    span, half = quantizer.levels.span, quantizer.levels.half
    return lambda column: on_grid(column, scale_in, offset, scale_out, lowest, span, half)
