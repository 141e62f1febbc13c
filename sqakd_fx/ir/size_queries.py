"""Nodes that ask for a size or a type of a tensor, not for its values."""

from __future__ import annotations

import torch
from torch import fx

_SIZE_METHODS = {
    "size",
    "dim",
    "numel",
    "ndimension",
    "stride",
    "is_floating_point",
    "is_complex",
    "get_device",
}
_SIZE_ATTRIBUTES = {
    "shape",
    "ndim",
    "dtype",
    "device",
    "layout",
    "is_cuda",
    "requires_grad",
    "is_sparse",
    "is_nested",
    "is_quantized",
    "itemsize",
}
_SIZE_FUNCTIONS = (len, torch.numel, torch.is_floating_point, torch.is_complex)


def asks_for_size(node: fx.Node) -> bool:
    """True for `x.size(0)`, `x.shape`, `x.dtype`, `len(x)`, `torch.is_floating_point(x)` and aten.sym_size."""
    if node.op == "call_method":
        return node.target in _SIZE_METHODS
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name == "aten::sym_size"
    return node.target in _SIZE_FUNCTIONS or (
        node.target is getattr and node.args[1] in _SIZE_ATTRIBUTES
    )


def depends_on_input(node: fx.Node) -> bool:
    """True where values of an input, not only its size, reach the node."""
    pending, seen = [node], {node}
    while pending:
        one = pending.pop()
        if one.op == "placeholder":
            return True
        sources = [] if asks_for_size(one) else one.all_input_nodes
        pending += [source for source in sources if source not in seen]
        seen.update(sources)
    return False
