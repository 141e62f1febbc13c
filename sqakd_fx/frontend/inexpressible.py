"""What is traced, and no file can compute for one sample alone or at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from sqakd_fx.diagnostics.source_lines import code_line
from sqakd_fx.errors import TraceError
from sqakd_fx.ir.op_names import op_name
from sqakd_fx.ir.size_queries import depends_on_input

_TRAINING = 5
"""Position of `training` in the arguments of batch_norm, as a function and as an overload."""

NESTED = "makes nested tensors, for which ONNX has no form: pad to one length, and pass a mask"


def refuse_inexpressible(graph_module: fx.GraphModule) -> None:
    """Raise TraceError for a BatchNorm without running statistics, CrossMapLRN2d, an LSTM that projects, torch.cond."""
    modules = dict(graph_module.named_modules())
    for node in graph_module.graph.nodes:
        reason = _REASONS.get(op_name(node, modules) or "")
        sentence = None if reason is None else reason(node, modules)
        if sentence is not None:
            where = node.target if node.op == "call_module" else code_line(node) or node.name
            raise TraceError(sentence.format(where=where), node=node.name, location=code_line(node))


def refuse_transforms(graph: fx.Graph) -> None:
    """Raise TraceError for gradients, functions of torch.func and nested tensors, which a graph cannot run again."""
    for node in graph.nodes:
        module = str(getattr(node.target, "__module__", ""))
        name = str(getattr(node.target, "__name__", node.target))
        reason = ""
        if node.target in (torch.autograd.grad, torch.autograd.backward) or name == "backward":
            reason = "takes a gradient in forward, which no file computes: leave it to the code that calls the model"
        elif "functorch" in module and code_line(node):
            reason = "calls a function of torch.func, such as vmap: write it with a batch axis"
        elif "nested" in module or "nested" in name:
            reason = NESTED
        if reason:
            location = code_line(node)
            raise TraceError(
                f"{location or 'the model'} {reason}", node=node.name, location=location
            )


def _cond(node: fx.Node, modules: dict[str, Any]) -> str | None:
    return (
        "torch.cond at {where} chooses a branch by the data: compute both and choose with torch.where, or take the "
        "branch of the example by an if and specialize in the recipe"
    )


def _batch_norm(node: fx.Node, modules: dict[str, Any]) -> str | None:
    if not _uses_the_batch(node, modules) or not depends_on_input(node):
        return None  # weights that are standardized are constants
    return (
        "the BatchNorm at {where} has no running statistics and normalizes by those of each batch, so that an answer "
        "would depend on the other samples: let it learn them (track_running_stats=True), or use GroupNorm"
    )


def _channel_response(node: fx.Node, modules: dict[str, Any]) -> str | None:
    return (
        "the CrossMapLRN2d at {where} adds its first channel to the sums of all others, which no operation of ONNX "
        "does: use LocalResponseNorm"
    )


def _lstm(node: fx.Node, modules: dict[str, Any]) -> str | None:
    if node.op != "call_module" or not modules[str(node.target)].proj_size:
        return None
    return (
        "the LSTM at {where} projects its hidden state (proj_size), which ONNX's LSTM does not: train one without, or "
        "write the recurrence with LSTMCell and Linear"
    )


def _uses_the_batch(node: fx.Node, modules: dict[str, Any]) -> bool:
    if node.op == "call_module":
        return modules[str(node.target)].running_mean is None
    given = node.args[_TRAINING] if len(node.args) > _TRAINING else False
    training = node.kwargs.get("training", given)
    return training is True  # an overload without it has the momentum there


_REASONS: dict[str, Callable[[fx.Node, dict[str, Any]], str | None]] = {
    "batch_norm": _batch_norm,
    "cross_map_lrn2d": _channel_response,
    "lstm": _lstm,
    "cond": _cond,
}
