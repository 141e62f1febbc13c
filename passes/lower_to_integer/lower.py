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
import math
import re
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.nn import functional as F

import sqakd_fx.ir.integer_ops  # noqa: F401  (registers torch.ops.sqakd_fx)
from sqakd_fx.errors import PassError
from sqakd_fx.ir import meta
from sqakd_fx.ir.op_table import (
    Kind,
    Op,
    convolution,
    is_read_by_max_pool,
    op_of,
    shape_of,
)
from sqakd_fx.ir.paddings import pad_amounts, pad_value
from sqakd_fx.ir.pass_manager import Note, Pass, PassResult
from sqakd_fx.ir.quantized_tensors import QuantizedTensor
from sqakd_fx.ir.rewriting import constant_of, get_attribute, set_attribute
from sqakd_fx.passes.lower_to_integer.average_pools import (
    adaptive_pool_settings,
    pool_settings,
    rounds_up,
)
from sqakd_fx.passes.lower_to_integer.builder import LoweredGraph, integer_operation
from sqakd_fx.passes.lower_to_integer.clips import (
    Clip,
    clip_bounds,
    clipped_range,
    is_inside,
    is_representable,
)
from sqakd_fx.passes.lower_to_integer.layers import (
    Arithmetic,
    Codes,
    Layer,
    StoredGrid,
    as_convolution,
    with_affine,
)
from sqakd_fx.passes.lower_to_integer.pools_of_codes import pool_of_codes
from sqakd_fx.quant.batch_norm import (
    AFFINE_CODE,
    AFFINE_SCALE,
    AbsorbedBatchNorm,
    AffineBatchNorm,
    RoundedBias,
    affine_of,
)
from sqakd_fx.quant.grid import Grid, encode
from sqakd_fx.quant.quantizer import Quantizer

_OPS = torch.ops.sqakd_fx


Value = Codes | Layer | Arithmetic | fx.Node | tuple[Any, ...]


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
        with torch.no_grad():
            lowered, notes = _Lowering(graph_module).run()
        return PassResult(lowered, True, tuple(notes))

    def ensures(self, result: PassResult) -> None:
        for module in result.graph_module.modules():
            if isinstance(module, Quantizer):
                raise PassError("a quantizer of the training graph survived the lowering")


class _Lowering:
    """Builds a new graph, node by node; what a layer becomes is decided by who reads it."""

    def __init__(self, student: fx.GraphModule) -> None:
        self.student = student
        self.modules = dict(student.named_modules())
        self.built = LoweredGraph()
        self.lowered = self.built.module
        self.graph = self.lowered.graph
        self.values: dict[fx.Node, Any] = {}
        self.floats: dict[Any, fx.Node] = {}
        self.grids: dict[str, StoredGrid] = {}
        self.notes: list[Note] = []

    def run(self) -> tuple[fx.GraphModule, list[Note]]:
        for node in self.student.graph.nodes:
            self.values[node] = self._lower(node)
        self.lowered.eval()
        return self.lowered, self.notes

    # -- one node --------------------------------------------------------------------------

    def _lower(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            new = self.graph.placeholder(str(node.target), default_value=_default(node))
            new.meta = dict(node.meta)
            return new
        if node.op == "output":
            output = fx.map_arg(node.args[0], self._float)
            return self.graph.output(output)
        if node.op == "get_attr":
            return node
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            if isinstance(module, Quantizer):
                return self._quantizer(node, module)
            if isinstance(module, AbsorbedBatchNorm):
                return self._absorbed(node, module)
            if isinstance(module, AffineBatchNorm):
                return self._affine(node, module)
            if isinstance(module, RoundedBias):
                return node
        op = op_of(node, self.modules)
        if op is not None:
            lowered = self._by_kind(node, op)
            if lowered is not None:
                return lowered
        return self._copy(node)

    def _by_kind(self, node: fx.Node, op: Op) -> Any:
        if op.kind is Kind.COMPUTE and meta.layer(node) is not None:
            return self._layer(node, op)
        if meta.weight_only(node) is not None:
            return self._weight_only(node)
        if meta.is_table(node):
            return self._look_up(node)
        if meta.arithmetic(node) is not None:
            return self._arithmetic(node, op)
        if op.kind is Kind.CLIP and node.op == "call_function":
            return self._clip(node, op)
        if op.kind is Kind.TRANSPARENT:
            source = node.args[0] if node.args else None
            value = self.values.get(source) if isinstance(source, fx.Node) else None
            if isinstance(value, Codes) and op.pads:
                return self._padded(node, value)
            if isinstance(value, Codes):
                if op.takes_largest:  # torch pools integers only in the plain memory format
                    plain = self.graph.call_method("contiguous", (value.node,))
                    value = replace(value, node=plain)
                if not op.on_bytes:
                    pooled = pool_of_codes(self.graph, node, op, self.modules, value.node)
                    return replace(value, node=pooled)
                return replace(value, node=self._on_codes(node, {source: value}))
        if op.kind is Kind.JOINT:
            return self._joint(node)
        return None

    def _padded(self, node: fx.Node, value: Codes) -> Codes:
        """Zero is the zero point; -inf, which max pooling reads, is the smallest code."""
        code = value.grid.qmin if pad_value(node) == -math.inf else value.grid.zero_point
        padded = self.graph.call_function(F.pad, (value.node, pad_amounts(node)), {"value": code})
        return replace(value, node=padded)

    # -- quantizers ------------------------------------------------------------------------

    def _quantizer(self, node: fx.Node, module: Quantizer) -> Any:
        if module.role == "weight":
            return node
        stored = self._grid(str(node.target), module)
        source = node.args[0]
        assert isinstance(source, fx.Node)
        value = self.values[source]
        name = _quantized_path(str(node.target))
        if isinstance(value, Layer | Arithmetic):
            stored = stored.clipped(*clipped_range(stored.grid, value.clip))
            code = self.built.quantized(value, stored)
            code = self.built.shaped(value, self._tag(code, name, stored.grid, module))
            meta.set_quantizer_node(code, node.name)
            return Codes(code, stored)
        grid = stored.grid
        if isinstance(value, Codes) and value.grid.same_as(grid) and is_inside(value.grid, grid):
            return value
        constant = constant_of(self.student, source)
        if constant is not None:
            codes = encode(constant.detach().float(), grid).to(torch.uint8)
            code = self.built.buffer(f"{source.target}_codes", codes)
        else:
            code = self.graph.call_function(
                _OPS.quantize.default,
                (
                    self._unfused_softmax(source),
                    *self.built.grid_parameters(stored),
                    grid.qmin,
                    grid.qmax,
                ),
            )
            meta.set_quantizer_node(code, node.name)
        return Codes(self._tag(code, name, grid, module), stored)

    def _tag(self, node: fx.Node, name: str, grid: Grid, module: Quantizer) -> fx.Node:
        """What the exported file says of a quantized tensor."""
        tensor = QuantizedTensor(
            path=name,
            bits=grid.bits,
            qmin=grid.qmin,
            qmax=grid.qmax,
            family=module.family.name,
            granularity="tensor" if module.axis is None else "channel",
            module=meta.module_path(node) or name.rpartition(".")[0],
            made_by="insert_quantizers",
        )
        meta.set_quantized_tensor(node, tensor)
        return node

    def _grid(self, target: str, module: Quantizer) -> StoredGrid:
        if target not in self.grids:
            grid = module.grid()
            grid = replace(grid, scale=grid.scale.cpu())
            stem = _quantized_path(target)
            scale = set_attribute(self.lowered, f"{stem}.scale", grid.scale)
            zero = torch.tensor(grid.zero_point, dtype=torch.uint8)
            zero_point = set_attribute(self.lowered, f"{stem}.zero_point", zero)
            self.grids[target] = StoredGrid(grid, scale, zero_point)
        return self.grids[target]

    # -- integer layers --------------------------------------------------------------------

    def _layer(self, node: fx.Node, op: Op) -> Any:
        inputs = [self.values[cast(fx.Node, node.args[i])] for i in op.activations]
        if not all(isinstance(value, Codes) for value in inputs):
            raise PassError(f"{node.name} has an input that is not on a grid", node=node.name)
        x = inputs[0]
        if op.weight is None:
            scale = x.grid.scale * inputs[1].grid.scale
            return Layer(node, op, tuple(inputs), (), None, None, scale, None)
        quantizer_node = cast(fx.Node, node.args[op.weight])
        quantizer = cast(Quantizer, self.modules[str(quantizer_node.target)])
        weight = self._constant(quantizer_node.args[0])
        grid = quantizer.grid(weight)
        grid = replace(grid, scale=grid.scale.cpu())
        codes = quantizer.codes(weight).to(torch.int8).cpu()
        bare = Layer(
            node, op, (x,), tuple(node.args[3:]), codes, grid, x.grid.scale * grid.scale, None
        )
        layer = as_convolution(bare)
        rounding = node.args[2]
        if isinstance(rounding, fx.Node) and rounding.op == "call_module":
            bias = self._constant(rounding.args[0]).float().cpu()
            return with_affine(layer, torch.ones_like(bias), bias)
        return layer

    def _weight_only(self, node: fx.Node) -> fx.Node:
        """A linear layer in float whose weight is stored in codes."""
        read = cast(fx.Node, node.args[1])
        quantizer = cast(Quantizer, self.modules[str(read.target)])
        weight = self._constant(read.args[0])
        path = meta.module_path(node) or node.name
        codes, scale = self._stored(f"{path}.weight", quantizer, weight)
        self.floats[read] = self.graph.call_function(_OPS.dequantize_weight.default, (codes, scale))
        return self._copy(node)

    def _look_up(self, node: fx.Node) -> fx.Node:
        indices, rows = cast(tuple[fx.Node, fx.Node], node.args)
        quantizer = cast(Quantizer, self.modules[str(rows.target)])
        source = cast(fx.Node, rows.args[0])
        table = self._constant(source)
        codes, scale = self._stored(str(source.target), quantizer, table)
        for layer in self.student.graph.nodes:
            if meta.layer(layer) is not None and any(
                x.op == "call_module" and x.target == rows.target for x in layer.all_input_nodes
            ):
                self.built.share(f"{meta.module_path(layer) or layer.name}.weight", codes)
        new = self.graph.call_function(_OPS.look_up.default, (self._float(indices), codes, scale))
        new.meta = dict(node.meta)
        return new

    def _stored(self, name: str, quantizer: Quantizer, weight: Tensor) -> tuple[fx.Node, fx.Node]:
        """INT8 codes and scales of a weight that a float operation reads."""
        values, grid = quantizer.codes(weight).to(torch.int8), quantizer.grid(weight)
        codes = self.built.buffer(name, values)
        least, most = int(values.min()), int(values.max())
        granularity = "tensor" if grid.axis is None else "channel"
        tensor = QuantizedTensor(name, grid.bits, least, most, quantizer.family.name, granularity)
        meta.set_quantized_tensor(codes, tensor)
        return codes, self.built.buffer(f"{name}_scale", grid.scale)

    def _constant(self, node: Any) -> Tensor:
        value = constant_of(self.student, node)
        assert value is not None
        return value.detach()

    def _absorbed(self, node: fx.Node, module: AbsorbedBatchNorm) -> Any:
        source = cast(fx.Node, node.args[0])
        layer = self.values[source]
        assert isinstance(layer, Layer)
        a, b = (t.detach().float().cpu() for t in affine_of(module.batch_norm))
        if len(node.args) > 2:
            b = b + a * self._constant(node.args[2]).float().cpu()
        return with_affine(layer, a, b)

    def _affine(self, node: fx.Node, module: AffineBatchNorm) -> Layer:
        """A BatchNorm of its own: a depthwise 1 × 1 convolution with one weight code a channel."""
        x = self.values[cast(fx.Node, node.args[0])]
        assert isinstance(x, Codes)
        axes = len(shape_of(node) or ()) - 2
        op = convolution(axes)
        a, b = (t.detach().float().cpu() for t in affine_of(module.batch_norm))
        ones = torch.full((len(a), 1, *[1] * axes), AFFINE_CODE, dtype=torch.int8)
        grid = Grid(AFFINE_SCALE, 0, -AFFINE_CODE, AFFINE_CODE, 8)
        geometry = ([1] * axes, [0] * axes, [1] * axes, len(a))
        scale = x.grid.scale * AFFINE_SCALE
        return with_affine(Layer(node, op, (x,), geometry, ones, grid, scale, None), a, b)

    # -- sums, products, averages ----------------------------------------------------------

    def _arithmetic(self, node: fx.Node, op: Op) -> Any:
        inputs = [self.values[cast(fx.Node, node.args[i])] for i in op.activations]
        if not all(isinstance(value, Codes) for value in inputs):
            return None
        if op.kind is not Kind.AVERAGE:
            return Arithmetic(node, integer_operation(op), tuple(inputs), ())
        ins, outs = shape_of(cast(fx.Node, node.args[0])) or (), shape_of(node) or ()
        if op.axes is None:
            keep = len(outs) == len(ins)
            return Arithmetic(node, integer_operation(op), tuple(inputs), (), keep_axes=keep)
        if len(ins) != op.axes + 2:
            return None
        if op.adaptive and all(size == 1 for size in outs[2:]):
            return Arithmetic(node, _OPS.global_average_pool.default, tuple(inputs), ())
        settings = (
            adaptive_pool_settings(ins[2:], outs[2:])
            if op.adaptive
            else pool_settings(node, self.modules, ins, outs)
        )
        if settings is None:
            return None
        return Arithmetic(node, integer_operation(op), tuple(inputs), settings)

    # -- clips and moves -------------------------------------------------------------------

    def _clip(self, node: fx.Node, op: Op) -> Any:
        bounds = clip_bounds(node, op)
        source = cast(fx.Node, node.args[0])
        value = self.values[source]
        if bounds is None:
            return None
        lower, upper = bounds
        if isinstance(value, Layer | Arithmetic):
            return replace(value, clip=value.clip.then(lower, upper))
        if isinstance(value, Codes) and is_representable(value.grid, lower, upper):
            low, high = clipped_range(value.grid, Clip(lower, upper))
            if (low, high) == (value.grid.qmin, value.grid.qmax):
                return value
            clipped = self.graph.call_function(_OPS.clip.default, (value.node, low, high))
            return Codes(clipped, value.stored.clipped(low, high))
        return None

    def _joint(self, node: fx.Node) -> Any:
        flat = list(node.all_input_nodes)
        values = [self.values[source] for source in flat]
        if not values or not all(isinstance(v, Codes) for v in values):
            return None
        first = values[0]
        if not all(v.grid.same_as(first.grid) for v in values):
            return None
        stored = first.stored.clipped(
            min(v.grid.qmin for v in values), max(v.grid.qmax for v in values)
        )
        new = self._on_codes(node, dict(zip(flat, values, strict=True)))
        return Codes(new, stored)

    def _on_codes(self, node: fx.Node, codes: dict[Any, Codes]) -> fx.Node:
        def pick(source: fx.Node) -> fx.Node:
            return codes[source].node if source in codes else self._float(source)

        self._bring_module(node)
        new = self.graph.node_copy(node, pick)
        meta.keep_only_module_path(new, node)
        return new

    # -- floats ----------------------------------------------------------------------------

    def _unfused_softmax(self, node: fx.Node) -> fx.Node:
        """The float tensor of a node; a softmax is kept from the runtime's integer kernel.

        ONNX Runtime 1.31's QLinearSoftmax is slower than the float operator between DequantizeLinear and
        QuantizeLinear, and does not saturate: a probability above the largest code becomes 0. A minimum
        with 1 changes nothing and stands between.
        """
        value = self._float(node)
        op = op_of(node, self.modules)
        source = node.all_input_nodes[0] if node.all_input_nodes else None
        on_grid = isinstance(self.values.get(source) if source else None, Codes)
        if op is None or not op.reads_scores or not on_grid:
            return value
        one = self.built.buffer("one", torch.tensor(1.0))
        return self.graph.call_function(torch.minimum, (value, one))

    def _float(self, node: fx.Node) -> fx.Node:
        """The float tensor of a student's node in the lowered graph."""
        if node in self.floats:
            return self.floats[node]
        value = self.values[node]
        new = self._materialize(value)
        self.floats[node] = new
        return new

    def _materialize(self, value: Any) -> fx.Node:
        if isinstance(value, Codes):
            return self.graph.call_function(
                _OPS.dequantize.default,
                (value.node, *self.built.grid_parameters(value.stored)),
            )
        if isinstance(value, Layer):
            real = self.built.shaped(value, self.built.dequantized(value))
            return self._float_clip(real, value.clip)
        if isinstance(value, Arithmetic):
            return self._float_clip(self._float_arithmetic(value), value.clip)
        assert isinstance(value, fx.Node)
        if value.graph is self.graph:
            return value
        return self._constant_node(value)

    def _float_arithmetic(self, value: Arithmetic) -> fx.Node:
        def pick(source: fx.Node) -> fx.Node:
            return self._float(source)

        self._bring_module(value.source)
        return self.graph.node_copy(value.source, pick)

    def _float_clip(self, node: fx.Node, clip: Clip) -> fx.Node:
        if clip.is_open:
            return node
        lower = None if clip.lower == float("-inf") else clip.lower
        upper = None if clip.upper == float("inf") else clip.upper
        return self.graph.call_function(torch.clamp, (node, lower, upper))

    def _constant_node(self, node: fx.Node) -> fx.Node:
        """A get_attr, quantized weight or rounded bias that a float operation reads."""
        if node.op == "get_attr":
            tensor = get_attribute(self.student, str(node.target))
            return self.built.buffer(str(node.target), tensor.detach())
        module = self.modules[str(node.target)]
        inputs = [self._constant(argument) for argument in node.args]
        return self.built.buffer(f"{node.target}.value", module(*inputs).detach())

    def _copy(self, node: fx.Node) -> fx.Node:
        self._bring_module(node)
        new = self.graph.node_copy(node, self._float)
        new.meta = dict(node.meta)
        return self._unfused(node, new)

    def _unfused(self, node: fx.Node, new: fx.Node) -> fx.Node:
        """A minimum with infinity behind what ONNX Runtime 1.31 would merge into a kernel that is wrong.

        A Pad with zeros becomes part of a MaxPool, which pads with -inf; an AveragePool with ceil_mode between
        DequantizeLinear and QuantizeLinear becomes QLinearAveragePool, which divides the last windows wrongly.
        """
        op = op_of(node, self.modules)
        windows = op is not None and op.kind is Kind.AVERAGE and op.axes and not op.adaptive
        averages = windows and rounds_up(node, self.modules)
        if not is_read_by_max_pool(node, self.modules) and not averages:
            return new
        infinity = self.built.buffer("infinity", torch.tensor(math.inf))
        return self.graph.call_function(torch.minimum, (new, infinity))

    def _bring_module(self, node: fx.Node) -> None:
        if node.op == "call_module":
            self.built.bring_module(str(node.target), self.modules[str(node.target)])


def _default(node: fx.Node) -> Any:
    return node.args[0] if node.args else inspect.Signature.empty


def _quantized_path(quantizer: str) -> str:
    return re.sub(r"[._]output_quantizer$", "", quantizer)
