"""Move the sizes of channels from activations into the weights that read them (SmoothQuant, Xiao 2022).

    Before:  y = W norm(x; γ, β)                     y = W2 f(W1 x + b1)
    After:   y = (W S) norm(x; γ / s, β / s)         y = (W2 S) f(S⁻¹ W1 x + S⁻¹ b1)

    s_c = max|x_c|^α / max|w_c|^(1-α)

over all layers that read channel c, normalized to a geometric mean of 1. α is the strength: 0 makes the weights
alike, 1 the activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, fx

from sqakd_fx.errors import PassError
from sqakd_fx.ir.pass_manager import Note, Pass, PassResult
from sqakd_fx.plan.channel_seams import Seam, find_seams, largest_of, largest_weights, rescale

_LARGEST_SIZE = 2.0**10


@dataclass(frozen=True)
class SmoothActivations(Pass):
    """Move the sizes of channels from activations into the weights that read them.

    `largest` holds by layer the largest |x| of each input channel, `strength` is α.
    """

    name: ClassVar[str] = "smooth_activations"

    largest: Mapping[str, Tensor] = field(default_factory=dict)
    strength: float = 0.5

    def requires(self, graph_module: fx.GraphModule) -> None:
        if graph_module.training:
            raise PassError("smoothing needs the graph in evaluation mode: call eval() first")
        if not 0 <= self.strength <= 1:
            raise PassError(f"the strength {self.strength} is not in 0 to 1")

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        found, notes = find_seams(graph_module)
        changed = False
        for seam in found:
            missing = [r.layer.name for r in seam.readers if r.layer.name not in self.largest]
            if missing:
                reason = f"no data was seen at {missing[0]}"
                notes.append(Note(seam.source.name, f"the sizes of its channels stay: {reason}"))
                continue
            rescale(graph_module, seam, self._sizes(graph_module, seam))
            changed = True
        return PassResult(graph_module, changed, tuple(notes))

    def ensures(self, result: PassResult) -> None:
        result.require_finite()

    def _sizes(self, graph_module: fx.GraphModule, seam: Seam) -> Tensor:
        """s of each channel, float32; 1 for one that is always zero or that nothing reads."""
        values = torch.stack(
            [
                largest_of(self.largest[r.layer.name].cpu(), r.channel, seam.channels)
                for r in seam.readers
            ]
        ).amax(0)
        weights = torch.stack(
            [largest_weights(graph_module, r.weight, seam.channels) for r in seam.readers]
        ).amax(0)
        alive = (values > 0) & (weights > 0)
        tiny = torch.finfo(torch.float32).tiny
        log = self.strength * values.clamp_min(tiny).log()
        log = log - (1 - self.strength) * weights.clamp_min(tiny).log()
        if not bool(alive.any()):
            return torch.ones_like(values)
        centred = torch.where(alive, log - log[alive].mean(), torch.zeros_like(log))
        return centred.exp().clamp(1 / _LARGEST_SIZE, _LARGEST_SIZE)
