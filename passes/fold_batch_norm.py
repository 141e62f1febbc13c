"""Fold BatchNorm into the convolution or linear layer in front of it.

    Before:  y = bn(conv(x, W) + b)        y = γ (conv(x, W) + b - mean) / sqrt(var + ε) + β
    After:   y = conv(x, aW) + (b - mean) a + β           with a = γ / sqrt(var + ε) per channel

Works for conv, conv-transpose and linear, module or functional, wherever the layer has no other
consumer and its weight no other user.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from sqakd_fx.errors import PassError
from sqakd_fx.ir.pass_manager import Note, Pass, PassResult
from sqakd_fx.ir.rewriting import drop_unused, reads_of
from sqakd_fx.quant.batch_norm import affine_of, fold_into, is_batch_norm, sole_compute_input


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
            fold_into(graph_module, layer, *affine_of(modules[str(node.target)]))
            node.replace_all_uses_with(layer)
            graph_module.graph.erase_node(node)
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
