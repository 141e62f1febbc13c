"""What is traced, and no file can compute for one sample alone or at all."""

from __future__ import annotations

from typing import Any

from torch import fx

from sqakd_fx.diagnostics.source_lines import code_line
from sqakd_fx.errors import TraceError
from sqakd_fx.ir.op_names import op_name

_TRAINING = 5
"""Position of `training` in the arguments of batch_norm, as a function and as an overload."""


def refuse_inexpressible(graph_module: fx.GraphModule) -> None:
    """Raise TraceError for a BatchNorm without running statistics, an nn.CrossMapLRN2d, an LSTM that projects."""
    modules = dict(graph_module.named_modules())
    for node in graph_module.graph.nodes:
        name = op_name(node, modules)
        where = node.target if node.op == "call_module" else code_line(node) or node.name
        reason = None
        if name == "batch_norm" and _uses_the_batch(node, modules):
            reason = (
                f"the BatchNorm at {where} has no running statistics and normalizes by those of each batch, so that "
                "an answer would depend on the other samples: let it learn them (track_running_stats=True), or "
                "use GroupNorm"
            )
        elif name == "cross_map_lrn2d":
            reason = (
                f"the CrossMapLRN2d at {where} adds its first channel to the sums of all others, which no operation "
                "of ONNX does: use LocalResponseNorm"
            )
        elif name == "lstm" and node.op == "call_module" and modules[str(node.target)].proj_size:
            reason = (
                f"the LSTM at {where} projects its hidden state (proj_size), which ONNX's LSTM does not: train one "
                "without, or write the recurrence with LSTMCell and Linear"
            )
        if reason is not None:
            raise TraceError(reason, node=node.name, location=code_line(node))


def _uses_the_batch(node: fx.Node, modules: dict[str, Any]) -> bool:
    if node.op == "call_module":
        return modules[str(node.target)].running_mean is None
    given = node.args[_TRAINING] if len(node.args) > _TRAINING else False
    return bool(node.kwargs.get("training", given))
