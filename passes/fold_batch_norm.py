"""Fold BatchNorm into the convolution or linear layer in front of it.

    Before:  y = bn(conv(x, W) + b)        y = γ (conv(x, W) + b - mean) / sqrt(var + ε) + β
    After:   y = conv(x, aW) + (b - mean) a + β           with a = γ / sqrt(var + ε) per channel

Works for conv, conv-transpose and linear, module or functional, wherever the layer has no other
consumer and its weight no other user.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from sqakd_fx.errors import PassError
from sqakd_fx.ir.op_table import TABLE
from sqakd_fx.ir.pass_manager import Note, Pass, PassResult
from sqakd_fx.ir.rewriting import constant_of, drop_unused, insert_attribute, reads_of
from sqakd_fx.quant.batch_norm import affine_of, is_batch_norm, sole_compute_input


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold BatchNorm into the weight and bias of the layer in front of it."""

    name = "fold_batch_norm"

    def requires(self, graph_module: fx.GraphModule) -> None:
        if graph_module.training:
            raise PassError("folding needs the graph in evaluation mode: call eval() first")

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        modules = dict(graph_module.named_modules())
        reads = reads_of(graph_module.graph)
        notes: list[Note] = []
        changed = False
        for node in list(graph_module.graph.nodes):
            if not is_batch_norm(node, modules):
                continue
            layer = sole_compute_input(graph_module, node, reads)
            if isinstance(layer, str):
                notes.append(Note(node.name, f"not folded: {layer}"))
                continue
            batch_norm = modules[str(node.target)]
            _fold(graph_module, layer, node, batch_norm)
            changed = True
        changed = graph_module.graph.eliminate_dead_code() or changed
        drop_unused(graph_module)
        return PassResult(graph_module, changed, tuple(notes))

    def ensures(self, result: PassResult) -> None:
        modules = dict(result.graph_module.named_modules())
        left = {note.node for note in result.notes}
        for node in result.graph_module.graph.nodes:
            if is_batch_norm(node, modules) and node.name not in left:
                raise PassError(f"{node.name} was neither folded nor noted", node=node.name)


def _fold(graph_module: fx.GraphModule, layer: fx.Node, node: fx.Node, module: nn.Module) -> None:
    op = TABLE[layer.target.__name__]  # type: ignore[union-attr]
    weight = constant_of(graph_module, layer.args[1])
    bias = constant_of(graph_module, layer.args[2])
    assert weight is not None
    multiplier, offset = affine_of(module)
    shape = [1] * weight.ndim
    groups = int(layer.args[6]) if op.channel_axis == 1 else 1  # type: ignore[arg-type]
    if groups > 1:
        grouped = torch.unflatten(weight, 0, (groups, -1)) * multiplier.reshape(
            groups, 1, -1, *shape[2:]
        )
        folded: Tensor = grouped.flatten(0, 1)
    else:
        shape[op.channel_axis] = -1
        folded = weight * multiplier.reshape(shape)
    offset = offset if bias is None else offset + bias * multiplier
    stem = str(layer.args[1].target)  # type: ignore[union-attr]
    new_weight = insert_attribute(
        graph_module, layer, f"{stem}_folded", nn.Parameter(folded.detach())
    )
    new_bias = insert_attribute(
        graph_module,
        layer,
        f"{stem.removesuffix('weight')}bias_folded",
        nn.Parameter(offset.detach()),
    )
    layer.args = (layer.args[0], new_weight, new_bias, *layer.args[3:])
    node.replace_all_uses_with(layer)
    graph_module.graph.erase_node(node)
