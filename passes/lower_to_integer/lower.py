"""Lower the trained graph to the integer program.

    Before:  xq = Qx(x); y = bn(conv(xq, Qw(W))); z = relu(y); zq = Qz(z)
    After:   acc = sqakd_fx.conv(x_codes, ..., W_codes, ..., bias)    int32
             z_codes = sqakd_fx.requantize(acc, acc_scale, ..., z_scale, z_zero_point, qmin, qmax)

Behind an integer layer the float value is acc_scale * acc. BatchNorm multiplies acc_scale by |a| per
channel, flips weight codes where a < 0, and adds an int32 bias. A clip narrows the code range of the
quantizer behind it: both are monotone, so quantize(clip(x, a, b)) = clip(codes, code(a), code(b)).
Operations that only move values work on codes. Everything else gets dequantized inputs.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sqakd_fx.errors import PassError
from sqakd_fx.ir import meta
from sqakd_fx.ir.op_table import Kind, Op, op_of
from sqakd_fx.ir.pass_manager import Pass, PassResult
from sqakd_fx.passes.lower_to_integer.arithmetic import integer_arithmetic
from sqakd_fx.passes.lower_to_integer.layers import batch_norm_alone, integer_layer, with_batch_norm
from sqakd_fx.passes.lower_to_integer.moves import clipped, joined, moved
from sqakd_fx.passes.lower_to_integer.padded import drop_unread_pads
from sqakd_fx.passes.lower_to_integer.quantizers import quantized
from sqakd_fx.passes.lower_to_integer.state import Lowering
from sqakd_fx.passes.lower_to_integer.stored_weights import (
    layer_in_float,
    looked_up_rows,
    recurrent_in_float,
)
from sqakd_fx.quant.batch_norm import AbsorbedBatchNorm, AffineBatchNorm, RoundedBias
from sqakd_fx.quant.quantizer import Quantizer


@dataclass(frozen=True)
class LowerToInteger(Pass):
    """Turn a calibrated graph into the integer program: codes, int32 accumulators, requantizations."""

    name = "lower_to_integer"

    def requires(self, graph_module: fx.GraphModule) -> None:
        if graph_module.training:
            raise PassError("lowering needs the graph in evaluation mode: call eval() first")
        for name, module in graph_module.named_modules():
            if isinstance(module, Quantizer) and not module.enabled:
                raise PassError(f"quantizer {name} is not calibrated: calibrate first", node=name)

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        lowering = Lowering(graph_module)
        with torch.no_grad():
            for node in graph_module.graph.nodes:
                lowering.values[node] = _lowered(lowering, node)
        drop_unread_pads(lowering.graph)
        return PassResult(lowering.built.module.eval(), True)

    def ensures(self, result: PassResult) -> None:
        for module in result.graph_module.modules():
            if isinstance(module, Quantizer):
                raise PassError("a quantizer of the training graph survived the lowering")


def _lowered(lowering: Lowering, node: fx.Node) -> Any:
    """What stands for a node; what a layer becomes is decided by who reads it."""
    if node.op == "placeholder":
        default = node.args[0] if node.args else inspect.Signature.empty
        new = lowering.graph.placeholder(str(node.target), default_value=default)
        new.meta = dict(node.meta)
        return new
    if node.op == "output":
        end = lowering.graph.output(fx.map_arg(node.args[0], lowering.float_of))
        meta.set_output_names(end, meta.output_names(node))
        return end
    if node.op == "get_attr":
        return node
    if node.op == "call_module":
        module = lowering.modules[str(node.target)]
        if isinstance(module, Quantizer):
            return quantized(lowering, node, module)
        if isinstance(module, AbsorbedBatchNorm):
            return with_batch_norm(lowering, node, module)
        if isinstance(module, AffineBatchNorm):
            return batch_norm_alone(lowering, node, module)
        if isinstance(module, RoundedBias):
            return node
    op = op_of(node, lowering.modules)
    found = None if op is None else _by_kind(lowering, node, op)
    return lowering.copied(node) if found is None else found


def _by_kind(lowering: Lowering, node: fx.Node, op: Op) -> Any:
    """What an operation becomes beside a float operation; None where it becomes that."""
    if op.kind is Kind.COMPUTE and meta.layer(node) is not None:
        return integer_layer(lowering, node, op)
    if meta.weight_only(node) is not None:
        return layer_in_float(lowering, node)
    if meta.is_table(node):
        return looked_up_rows(lowering, node)
    if meta.is_recurrent(node):
        return recurrent_in_float(lowering, node)
    if meta.arithmetic(node) is not None:
        return integer_arithmetic(lowering, node, op)
    if op.kind is Kind.CLIP and node.op == "call_function":
        return clipped(lowering, node, op)
    if op.kind is Kind.TRANSPARENT:
        return moved(lowering, node, op)
    if op.kind is Kind.JOINT:
        return joined(lowering, node)
    return None
