"""Take out of each bias what quantized weights add to the mean output (Nagel 2019, section 4.2); no labels are needed.

    Before:  y = W̃ x + b
    After:   y = W̃ x + (b - (E[W̃ x] - E[W x]))      E[W̃ x] - E[W x] = (W̃ - W) E[x]

E[x] is the mean of each input channel in float. Behind an absorbed BatchNorm its running mean moves instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from sqakd_fx.ir.pass_manager import Note, Pass, PassResult
from sqakd_fx.ir.rewriting import constant_of, reads_of
from sqakd_fx.quant.batch_norm import AbsorbedBatchNorm, RoundedBias, is_batch_norm
from sqakd_fx.quant.output_error import mean_error
from sqakd_fx.quant.quantized_layers import QuantizedLayer, quantized_layers, require_ranges


@dataclass(frozen=True)
class CorrectBias(Pass):
    """Take out of each bias what quantized weights add to the mean output.

    `means` holds by layer E[x] of each input channel, `weights` the float weights of layers whose weights have changed.
    """

    name: ClassVar[str] = "correct_bias"

    means: Mapping[str, Tensor] = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)

    def requires(self, graph_module: fx.GraphModule) -> None:
        require_ranges(graph_module)

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        modules = dict(graph_module.named_modules())
        reads = reads_of(graph_module.graph)
        notes: list[Note] = []
        changed = False
        for layer in quantized_layers(graph_module):
            reason = self._correct(graph_module, layer, modules, reads)
            if reason is None:
                changed = True
            else:
                sentence = f"the mean of its output is not corrected: {reason}"
                notes.append(Note(layer.node.name, sentence))
        return PassResult(graph_module, changed, tuple(notes))

    def ensures(self, result: PassResult) -> None:
        result.require_finite()

    @torch.no_grad()
    def _correct(
        self,
        graph_module: fx.GraphModule,
        layer: QuantizedLayer,
        modules: Mapping[str, nn.Module],
        reads: Mapping[str, int],
    ) -> str | None:
        """Correct one layer; returns why it cannot be."""
        node, weight = layer.node, layer.weight
        if node.name not in self.means:
            return "no data was seen there"
        error = layer.quantizer(weight) - self.weights.get(node.name, weight)
        shift = mean_error(node, layer.op, error, self.means[node.name])
        norm = _norm_behind(node, modules)
        if norm is not None:
            norm.running_mean.add_(shift)  # type: ignore[union-attr, operator]
            return None
        bias = _bias(graph_module, node, modules)
        if bias is None:
            return "it has no bias"
        source, value = bias
        if reads[str(source.target)] > 1:
            return "its bias is used more than once"
        value.sub_(shift)
        return None


def _norm_behind(node: fx.Node, modules: Mapping[str, nn.Module]) -> nn.Module | None:
    """The BatchNorm that alone reads a layer: part of it, or in float where the layer is."""
    for user in node.users:
        module = modules.get(str(user.target)) if user.op == "call_module" else None
        if isinstance(module, AbsorbedBatchNorm):
            return module.batch_norm
        if len(node.users) == 1 and is_batch_norm(user, modules) and _calls(user) == 1:
            return module
    return None


def _calls(node: fx.Node) -> int:
    """How often the module of a call is called."""
    return len(node.graph.find_nodes(op="call_module", target=node.target))


def _bias(
    graph_module: fx.GraphModule, node: fx.Node, modules: Mapping[str, nn.Module]
) -> tuple[fx.Node, Tensor] | None:
    source = node.args[2] if len(node.args) > 2 else None
    if not isinstance(source, fx.Node):
        return None
    if source.op == "call_module" and isinstance(modules.get(str(source.target)), RoundedBias):
        source = source.all_input_nodes[0]
    value = constant_of(graph_module, source)
    return None if value is None else (source, value)
