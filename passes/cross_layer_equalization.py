"""Give neighbouring layers weights of like size, channel by channel (Nagel 2019, section 4.1); no data is needed.

    Before:  y = W2 relu(W1 x + b1)
    After:   y = (W2 S) relu(S⁻¹ W1 x + S⁻¹ b1)      s_c = sqrt(r1_c / r2_c)

r1_c is the largest weight that writes channel c, r2_c the largest that reads it: both become sqrt(r1_c r2_c).
Through a chain of layers the seams are visited in turn until no size moves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from sqakd_fx.errors import PassError
from sqakd_fx.ir.pass_manager import Note, Pass, PassResult
from sqakd_fx.ir.rewriting import get_attribute
from sqakd_fx.plan.channel_seams import Seam, find_seams, largest_weights, rescale
from sqakd_fx.quant.batch_norm import affine_of

_SETTLED = 1e-3
_LARGEST_SIZE = 2.0**10


@dataclass(frozen=True)
class CrossLayerEqualization(Pass):
    """Give the weights that write and those that read a channel one size.

    `sweeps` is how often a chain of layers is visited at most.
    """

    name: ClassVar[str] = "cross_layer_equalization"

    sweeps: int = 20

    def requires(self, graph_module: fx.GraphModule) -> None:
        if graph_module.training:
            raise PassError("equalization needs the graph in evaluation mode: call eval() first")

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        found, notes = find_seams(graph_module)
        seams = [seam for seam in found if not seam.is_normalization]
        notes += [
            Note(
                seam.source.name, "the sizes of its channels stay: no weight of a layer writes them"
            )
            for seam in found
            if seam.is_normalization
        ]
        for _ in range(self.sweeps):
            largest = max((_equalize(graph_module, seam) for seam in seams), default=0.0)
            if largest < _SETTLED:
                break
        return PassResult(graph_module, bool(seams), tuple(notes))

    def ensures(self, result: PassResult) -> None:
        result.require_finite()


def _equalize(graph_module: fx.GraphModule, seam: Seam) -> float:
    """One seam; how far the sizes moved, as the largest |log s|."""
    written, read = _weights_written(graph_module, seam), _weights_read(graph_module, seam)
    alive = (written > 0) & (read > 0)
    size = torch.where(alive, (written / read.clamp_min(1e-30)).sqrt(), torch.ones_like(read))
    size = size.clamp(1 / _LARGEST_SIZE, _LARGEST_SIZE)
    rescale(graph_module, seam, size)
    return float(size.log().abs().max())


def _weights_written(graph_module: fx.GraphModule, seam: Seam) -> Tensor:
    assert seam.rows is not None
    largest = largest_weights(graph_module, seam.rows, seam.channels)
    if seam.batch_norm is not None:
        multiplier, _ = affine_of(get_attribute(graph_module, seam.batch_norm))
        largest = largest * multiplier.detach().abs()
    return largest


def _weights_read(graph_module: fx.GraphModule, seam: Seam) -> Tensor:
    return torch.stack(
        [largest_weights(graph_module, r.weight, seam.channels) for r in seam.readers]
    ).amax(0)
