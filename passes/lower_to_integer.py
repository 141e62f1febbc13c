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
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import sqakd_fx.integer_ops  # noqa: F401  (registers torch.ops.sqakd_fx)
from sqakd_fx.batch_norm import (
    AFFINE_CODE,
    AFFINE_SCALE,
    AbsorbedBatchNorm,
    AffineBatchNorm,
    RoundedBias,
    absorb,
    affine_of,
)
from sqakd_fx.compiler import Note, PassResult
from sqakd_fx.errors import PassError
from sqakd_fx.graphs import constant_of, get_attribute, module_path, set_attribute
from sqakd_fx.grid import Grid, encode
from sqakd_fx.ops import TABLE, Kind, Op, op_name, op_of, pad_amounts, pad_value, shape_of
from sqakd_fx.quantizer import Quantizer

_OPS = torch.ops.sqakd_fx


@dataclass(frozen=True)
class Clip:
    """The range that a fused activation leaves."""

    lower: float = float("-inf")
    upper: float = float("inf")

    def then(self, lower: float, upper: float) -> Clip:
        return Clip(min(max(self.lower, lower), upper), max(min(self.upper, upper), lower))

    @property
    def is_open(self) -> bool:
        return self == Clip()


@dataclass(frozen=True)
class Codes:
    """A tensor of uint8 codes in the lowered graph."""

    node: fx.Node
    grid: Grid
    scale: str
    zero_point: str


@dataclass(frozen=True)
class Unfolding:
    """How the phases of a transposed convolution are put together, per spatial axis."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    margin: tuple[int, ...]

    def apply(
        self, graph: fx.Graph, node: fx.Node, outs: Sequence[int], ins: Sequence[int]
    ) -> fx.Node:
        """(N, C · phases, n + margin, ...) to the transposed convolution's output (N, C, ...)."""
        axes = len(self.stride)
        sizes = [n + m for n, m in zip(ins[2:], self.margin, strict=True)]
        apart = graph.call_function(torch.reshape, (node, [-1, outs[1], *self.stride, *sizes]))
        order = [0, 1, *(a for i in range(axes) for a in (2 + axes + i, 2 + i))]
        woven = graph.call_function(torch.permute, (apart, order))
        whole = [n * s for n, s in zip(sizes, self.stride, strict=True)]
        made = graph.call_function(torch.reshape, (woven, [-1, outs[1], *whole]))
        for axis, (size, start) in enumerate(zip(whole, self.padding, strict=True), start=2):
            if (start, outs[axis]) != (0, size):
                made = graph.call_function(torch.narrow, (made, axis, start, outs[axis]))
        return made


@dataclass(frozen=True)
class Layer:
    """An integer layer whose accumulator has not been turned into codes or floats yet."""

    source: fx.Node
    op: Op
    inputs: tuple[Codes, ...]
    arguments: tuple[Any, ...]
    weight: Tensor | None
    weight_grid: Grid | None
    scale: Tensor
    bias: Tensor | None
    clip: Clip = field(default_factory=Clip)
    unfolding: Unfolding | None = None

    @property
    def source_rank(self) -> int:
        return len(shape_of(self.source) or ())


@dataclass(frozen=True)
class Arithmetic:
    """A sum, product or average of coded tensors, waiting for its output grid."""

    source: fx.Node
    target: Any
    inputs: tuple[Codes, ...]
    arguments: tuple[Any, ...]
    clip: Clip = field(default_factory=Clip)
    keep_axes: bool = True


Value = Codes | Layer | Arithmetic | fx.Node | tuple[Any, ...]


@dataclass(frozen=True)
class LowerToInteger:
    name: str = "lower_to_integer"

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
        self.root = nn.Module()
        self.lowered = fx.GraphModule(self.root, fx.Graph())
        self.graph = self.lowered.graph
        self.values: dict[fx.Node, Any] = {}
        self.floats: dict[Any, fx.Node] = {}
        self.attributes: dict[str, fx.Node] = {}
        self.buffers: dict[str, list[tuple[str, Tensor]]] = {}
        self.grids: dict[str, tuple[str, str, Grid]] = {}
        self.notes: list[Note] = []

    def run(self) -> tuple[fx.GraphModule, list[Note]]:
        for node in self.student.graph.nodes:
            self.values[node] = self._lower(node)
        self.graph.lint()
        self.lowered.recompile()
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
        if op.kind is Kind.COMPUTE and "layer" in node.meta:
            return self._layer(node, op)
        if op.kind in (Kind.SUM, Kind.PRODUCT, Kind.AVERAGE) and "arithmetic" in node.meta:
            return self._arithmetic(node, op)
        if op.kind is Kind.CLIP and node.op == "call_function":
            return self._clip(node, op)
        if op.kind is Kind.TRANSPARENT:
            source = node.args[0] if node.args else None
            value = self.values.get(source) if isinstance(source, fx.Node) else None
            if isinstance(value, Codes) and op.name == "zero_pad":
                return self._padded(node, value)
            if isinstance(value, Codes):
                if "max_pool" in op.name:  # torch pools integers only in the plain memory format
                    plain = self.graph.call_method("contiguous", (value.node,))
                    value = replace(value, node=plain)
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
        scale, zero_point, grid = self._grid(str(node.target), module)
        source = node.args[0]
        assert isinstance(source, fx.Node)
        value = self.values[source]
        name = _quantized_path(str(node.target))
        if isinstance(value, Layer):
            qmin, qmax = _clipped_range(grid, value.clip)
            code = self.graph.call_function(
                _OPS.requantize.default,
                (
                    self._accumulator(value),
                    self._buffer(f"{_path(value.source)}.accumulator_scale", value.scale),
                    _accumulator_axis(value),
                    self._read(scale),
                    self._read(zero_point),
                    qmin,
                    qmax,
                ),
            )
        elif isinstance(value, Arithmetic):
            qmin, qmax = _clipped_range(grid, value.clip)
            code = self.graph.call_function(
                value.target,
                (
                    *self._grid_arguments(value.inputs),
                    self._read(scale),
                    self._read(zero_point),
                    qmin,
                    qmax,
                    *value.arguments,
                ),
            )
            grid = replace(grid, qmin=qmin, qmax=qmax)
        elif isinstance(value, Codes) and value.grid.same_as(grid) and _inside(value.grid, grid):
            return value
        else:
            constant = constant_of(self.student, source)
            if constant is not None:
                codes = encode(constant.detach().float(), grid).to(torch.uint8)
                code = self._buffer(f"{source.target}_codes", codes)
                return Codes(self._tag(code, name, grid, module), grid, scale, zero_point)
            code = self.graph.call_function(
                _OPS.quantize.default,
                (
                    self._unfused_softmax(source, grid),
                    self._read(scale),
                    self._read(zero_point),
                    grid.qmin,
                    grid.qmax,
                ),
            )
        if isinstance(value, Layer):
            grid = replace(grid, qmin=qmin, qmax=qmax)
        code = self._tag(code, name, grid, module)
        if isinstance(value, Layer):
            code = self._unfolded(value, code)
        elif isinstance(value, Arithmetic):
            code = self._drop_axes(value, code)
        return Codes(code, grid, scale, zero_point)

    def _tag(self, node: fx.Node, name: str, grid: Grid, module: Quantizer) -> fx.Node:
        """What the exported file says of a quantized tensor."""
        node.meta["quantized_tensor"] = {
            "name": name,
            "bits": grid.bits,
            "qmin": grid.qmin,
            "qmax": grid.qmax,
            "family": module.family.name,
            "granularity": "tensor" if module.axis is None else "channel",
            "module": module_path(node) or name.rpartition(".")[0],
            "pass": "insert_quantizers",
        }
        return node

    def _grid(self, target: str, module: Quantizer) -> tuple[str, str, Grid]:
        if target not in self.grids:
            grid = module.grid()
            grid = replace(grid, scale=grid.scale.cpu())
            stem = _quantized_path(target)
            scale = set_attribute(self.lowered, f"{stem}.scale", grid.scale)
            zero = torch.tensor(grid.zero_point, dtype=torch.uint8)
            zero_point = set_attribute(self.lowered, f"{stem}.zero_point", zero)
            self.grids[target] = (scale, zero_point, grid)
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
        layer = _as_convolution(bare)
        rounding = node.args[2]
        if isinstance(rounding, fx.Node) and rounding.op == "call_module":
            bias = self._constant(rounding.args[0]).float().cpu()
            return _with_affine(layer, torch.ones_like(bias), bias)
        return layer

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
        return _with_affine(layer, a, b)

    def _affine(self, node: fx.Node, module: AffineBatchNorm) -> Layer:
        """A BatchNorm of its own: a depthwise 1 × 1 convolution with one weight code a channel."""
        x = self.values[cast(fx.Node, node.args[0])]
        assert isinstance(x, Codes)
        axes = len(shape_of(node) or ()) - 2
        op = TABLE[f"conv{axes}d"]
        a, b = (t.detach().float().cpu() for t in affine_of(module.batch_norm))
        ones = torch.full((len(a), 1, *[1] * axes), AFFINE_CODE, dtype=torch.int8)
        grid = Grid(AFFINE_SCALE, 0, -AFFINE_CODE, AFFINE_CODE, 8)
        geometry = ([1] * axes, [0] * axes, [1] * axes, len(a))
        scale = x.grid.scale * AFFINE_SCALE
        return _with_affine(Layer(node, op, (x,), geometry, ones, grid, scale, None), a, b)

    def _accumulator(self, layer: Layer) -> fx.Node:
        """The int32 sums; `_unfolded` gives what is made of them the layer's own shape."""
        key = ("accumulator", layer.source, layer.bias is None, id(layer.weight))
        if key in self.floats:
            return self.floats[key]
        path = _path(layer.source)
        if layer.weight is None:
            node = self.graph.call_function(_OPS.matmul.default, self._grid_arguments(layer.inputs))
        else:
            assert layer.weight_grid is not None
            weight = self._buffer(f"{path}.weight", layer.weight)
            settings = layer.source.meta.get("layer")
            weight.meta["quantized_tensor"] = {
                "name": f"{path}.weight",
                "bits": layer.weight_grid.bits,
                "qmin": int(layer.weight.min()),
                "qmax": int(layer.weight.max()),
                "family": settings.weight_family if settings else "affine",
                "granularity": "tensor" if layer.weight_grid.axis is None else "channel",
            }
            (x,) = layer.inputs
            if layer.op.name == "linear" and layer.source_rank > 2:
                flat = self.graph.call_function(
                    torch.reshape, (x.node, [-1, layer.weight.shape[1]])
                )
                x = replace(x, node=flat)
            arguments = (
                *self._grid_arguments((x,)),
                weight,
                self._buffer(f"{path}.weight_scale", layer.weight_grid.scale),
                self._buffer(f"{path}.accumulator_scale", layer.scale),
                None if layer.bias is None else self._buffer(f"{path}.bias", layer.bias),
                *_as_lists(layer.arguments),
            )
            target = _OPS.linear.default if layer.op.name == "linear" else _OPS.conv.default
            node = self.graph.call_function(target, arguments)
        node.meta["source"] = path
        self.floats[key] = node
        return node

    def _unfolded(self, layer: Layer, node: fx.Node) -> fx.Node:
        """Codes or floats made of an accumulator, in the shape of the layer's own output."""
        outs = shape_of(layer.source) or ()
        if layer.op.name == "linear" and len(outs) > 2:
            return self.graph.call_function(torch.reshape, (node, [-1, *outs[1:]]))
        if layer.unfolding is None:
            return node
        ins = shape_of(cast(fx.Node, layer.source.args[0])) or ()
        return layer.unfolding.apply(self.graph, node, outs, ins)

    # -- sums, products, averages ----------------------------------------------------------

    def _arithmetic(self, node: fx.Node, op: Op) -> Any:
        inputs = [self.values[cast(fx.Node, node.args[i])] for i in op.activations]
        if not all(isinstance(value, Codes) for value in inputs):
            return None
        if op.kind is not Kind.AVERAGE:
            return Arithmetic(node, getattr(_OPS, op.name).default, tuple(inputs), ())
        return self._average(node, op, inputs[0])

    def _average(self, node: fx.Node, op: Op, x: Codes) -> Any:
        ins, outs = shape_of(cast(fx.Node, node.args[0])) or (), shape_of(node) or ()
        if op.name == "mean":
            keep = len(outs) == len(ins)
            return Arithmetic(node, _OPS.global_average_pool.default, (x,), (), keep_axes=keep)
        axes = int(op.name[-2])
        if len(ins) != axes + 2:
            return None
        if op.name.startswith("adaptive"):
            if all(size == 1 for size in outs[2:]):
                return Arithmetic(node, _OPS.global_average_pool.default, (x,), ())
            if any(i % o for i, o in zip(ins[2:], outs[2:], strict=True)):
                return None
            kernel = [i // o for i, o in zip(ins[2:], outs[2:], strict=True)]
            return Arithmetic(
                node,
                _OPS.average_pool.default,
                (x,),
                (kernel, kernel, [0] * axes, [0] * axes, True),
            )
        settings = self._pool_settings(node, axes, ins, outs)
        if settings is None:
            return None
        return Arithmetic(node, _OPS.average_pool.default, (x,), settings)

    def _pool_settings(
        self, node: fx.Node, axes: int, ins: Sequence[int], outs: Sequence[int]
    ) -> tuple[Any, ...] | None:
        """Kernel, stride, padding at both ends, and whether padding counts."""
        names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
        defaults: dict[str, Any] = dict(zip(names, (None, None, 0, False, True), strict=True))
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            found = {name: getattr(module, name) for name in names}
            divisor = getattr(module, "divisor_override", None)
        else:
            found = defaults | dict(zip(names, node.args[1:], strict=False))
            found |= {k: v for k, v in node.kwargs.items() if k in names}
            divisor = node.kwargs.get("divisor_override")
        if divisor is not None:
            return None
        if found["stride"] in (None, [], ()):
            found["stride"] = found["kernel_size"]
        kernel, stride, padding = (
            [v] * axes if isinstance(v, int) else list(v) * (axes if len(v) == 1 else 1)
            for v in (found["kernel_size"], found["stride"], found["padding"])
        )
        count_pads = bool(found["count_include_pad"]) and any(padding)
        ends = list(padding)
        if found["ceil_mode"]:
            # ONNX Runtime's integer kernel is wrong with ceil_mode: the last window is padded instead
            ends = [
                p + max(0, (o - 1) * s + k - (i + 2 * p))
                for i, o, k, s, p in zip(ins[2:], outs[2:], kernel, stride, padding, strict=True)
            ]
            if count_pads and ends != padding:
                return None
        return kernel, stride, padding, ends, count_pads

    def _drop_axes(self, value: Arithmetic, node: fx.Node) -> fx.Node:
        return node if value.keep_axes else self.graph.call_function(torch.flatten, (node, 1))

    # -- clips and moves -------------------------------------------------------------------

    def _clip(self, node: fx.Node, op: Op) -> Any:
        bounds = _bounds(node, op)
        source = cast(fx.Node, node.args[0])
        value = self.values[source]
        if bounds is None:
            return None
        lower, upper = bounds
        if isinstance(value, Layer | Arithmetic):
            return replace(value, clip=value.clip.then(lower, upper))
        if isinstance(value, Codes) and _representable(value.grid, lower, upper):
            low, high = _clipped_range(value.grid, Clip(lower, upper))
            grid = replace(value.grid, qmin=low, qmax=high)
            if (low, high) == (value.grid.qmin, value.grid.qmax):
                return value
            clipped = self.graph.call_function(torch.clamp, (value.node, low, high))
            return replace(value, node=clipped, grid=grid)
        return None

    def _joint(self, node: fx.Node) -> Any:
        flat = list(node.all_input_nodes)
        values = [self.values[source] for source in flat]
        if not values or not all(isinstance(v, Codes) for v in values):
            return None
        first = values[0]
        if not all(v.grid.same_as(first.grid) for v in values):
            return None
        grid = replace(
            first.grid,
            qmin=min(v.grid.qmin for v in values),
            qmax=max(v.grid.qmax for v in values),
        )
        new = self._on_codes(node, dict(zip(flat, values, strict=True)))
        return replace(first, node=new, grid=grid)

    def _on_codes(self, node: fx.Node, codes: dict[Any, Codes]) -> fx.Node:
        def pick(source: fx.Node) -> fx.Node:
            return codes[source].node if source in codes else self._float(source)

        self._bring_module(node)
        new = self.graph.node_copy(node, pick)
        new.meta = {"module_path": module_path(node)}
        return new

    # -- floats ----------------------------------------------------------------------------

    def _unfused_softmax(self, node: fx.Node, grid: Grid) -> fx.Node:
        """The float tensor of a node; kept from the runtime's integer softmax where that would wrap.

        ONNX Runtime 1.31's QLinearSoftmax does not saturate: a probability above the largest code
        becomes 0. A minimum with 1 changes nothing and stands between.
        """
        value = self._float(node)
        op = op_of(node, self.modules)
        source = node.all_input_nodes[0] if node.all_input_nodes else None
        on_grid = isinstance(self.values.get(source) if source else None, Codes)
        largest = float(grid.scale) * (grid.qmax - grid.zero_point)
        if op is None or op.name != "softmax" or not on_grid or largest >= 1.0:
            return value
        one = self._buffer("one", torch.tensor(1.0))
        return self.graph.call_function(torch.minimum, (value, one))

    def _float(self, node: fx.Node) -> fx.Node:
        """The float tensor of a student's node in the lowered graph."""
        if node in self.floats:
            return self.floats[node]
        value = self.values[node]
        new = self._materialise(value)
        self.floats[node] = new
        return new

    def _materialise(self, value: Any) -> fx.Node:
        if isinstance(value, Codes):
            return self.graph.call_function(
                _OPS.dequantize.default,
                (value.node, self._read(value.scale), self._read(value.zero_point)),
            )
        if isinstance(value, Layer):
            scale = self._buffer(f"{_path(value.source)}.accumulator_scale", value.scale)
            new = self.graph.call_function(
                _OPS.dequantize_accumulator.default,
                (self._accumulator(value), scale, _accumulator_axis(value)),
            )
            return self._float_clip(self._unfolded(value, new), value.clip)
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
            return self._buffer(str(node.target), tensor.detach())
        module = self.modules[str(node.target)]
        inputs = [self._constant(argument) for argument in node.args]
        return self._buffer(f"{node.target}.value", module(*inputs).detach())

    def _copy(self, node: fx.Node) -> fx.Node:
        self._bring_module(node)
        new = self.graph.node_copy(node, self._float)
        new.meta = dict(node.meta)
        return self._unfused_pad(node, new)

    def _unfused_pad(self, node: fx.Node, new: fx.Node) -> fx.Node:
        """ONNX Runtime 1.31 merges a Pad with zeros into a MaxPool, which pads with -inf."""
        names = [op_name(user, self.modules) or "" for user in node.users]
        is_pad = op_name(node, self.modules) == "pad" and pad_amounts(node) is not None
        if not is_pad or not any("max_pool" in name for name in names):
            return new
        infinity = self._buffer("infinity", torch.tensor(math.inf))
        return self.graph.call_function(torch.minimum, (new, infinity))

    def _bring_module(self, node: fx.Node) -> None:
        if node.op != "call_module" or str(node.target) in dict(self.lowered.named_modules()):
            return
        set_attribute(self.lowered, str(node.target), self.modules[str(node.target)])

    # -- buffers ---------------------------------------------------------------------------

    def _grid_arguments(self, inputs: tuple[Codes, ...]) -> tuple[fx.Node, ...]:
        return tuple(
            part
            for codes in inputs
            for part in (codes.node, self._read(codes.scale), self._read(codes.zero_point))
        )

    def _buffer(self, wanted: str, value: Tensor) -> fx.Node:
        """A stored tensor called `wanted`, or like it where another one has that name."""
        value = value.detach().cpu()
        stored = self.buffers.setdefault(wanted, [])
        for name, known in stored:
            if known.dtype == value.dtype and torch.equal(known, value):
                return self._read(name)
        name = set_attribute(self.lowered, wanted, value.clone())
        stored.append((name, value))
        return self._read(name)

    def _read(self, name: str) -> fx.Node:
        if name not in self.attributes:
            self.attributes[name] = self.graph.get_attr(name)
        return self.attributes[name]


def _default(node: fx.Node) -> Any:
    return node.args[0] if node.args else inspect.Signature.empty


def _path(node: fx.Node) -> str:
    return module_path(node) or node.name


def _quantized_path(quantizer: str) -> str:
    return re.sub(r"[._]output_quantizer$", "", quantizer)


def _as_lists(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(list(a) if isinstance(a, tuple) else a for a in arguments)


def _accumulator_axis(layer: Layer) -> int:
    return -1 if layer.op.name in ("linear", "matmul") else 1


def _with_affine(layer: Layer, a: Tensor, b: Tensor) -> Layer:
    """The layer with y = a x + b behind it: in its weight scale, signs of codes, and int32 bias."""
    assert layer.weight is not None
    assert layer.weight_grid is not None
    codes, grid = layer.weight, layer.weight_grid
    if layer.unfolding is not None:
        phases = math.prod(layer.unfolding.stride)
        a, b = a.repeat_interleave(phases), b.repeat_interleave(phases)
    at = absorb(a, b, layer.inputs[0].grid.scale, grid.scale)
    keep = torch.where(at.dead, 0.0, at.sign).to(torch.int8)
    plain = bool((at.sign == 1).all()) and grid.axis is None and bool((at.unit == at.unit[0]).all())
    return replace(
        layer,
        weight=codes * keep.reshape(-1, *[1] * (codes.ndim - 1)),
        weight_grid=replace(
            grid,
            scale=at.weight_scale[0] if plain else at.weight_scale,
            axis=grid.axis if plain else 0,
        ),
        scale=at.unit[0] if plain else at.unit,
        bias=at.bias.to(torch.int32),
    )


def _as_convolution(layer: Layer) -> Layer:
    """A transposed convolution as a convolution with one output channel for every phase.

    y[s i + r] = Σ_j x[i - j] w[s j + r]: for each phase r < s a convolution with the reversed taps
    w[r], w[s + r], ...; interleaving the phases and cutting the padding gives y.
    """
    if not layer.op.name.startswith("conv_transpose"):
        return layer
    assert layer.weight is not None
    assert layer.weight_grid is not None
    stride, padding, extra, groups, dilation = layer.arguments
    weight, axes = layer.weight, len(stride)
    spread = [d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:], strict=True)]
    taps = [
        -(-(size + max(e - p, 0)) // s)
        for size, s, e, p in zip(spread, stride, extra, padding, strict=True)
    ]
    full = weight.new_zeros(*weight.shape[:2], *(t * s for t, s in zip(taps, stride, strict=True)))
    places: tuple[Any, ...] = (
        ...,
        *(slice(None, size, d) for size, d in zip(spread, dilation, strict=True)),
    )
    full[places] = weight
    outputs = weight.shape[1]
    split = [n for t, s in zip(taps, stride, strict=True) for n in (t, s)]
    by_phase = full.reshape(groups, -1, outputs, *split)
    tap_axes = [3 + 2 * i for i in range(axes)]
    phase_axes = [4 + 2 * i for i in range(axes)]
    reordered = by_phase.permute(0, 2, *phase_axes, 1, *tap_axes).flip(*range(-axes, 0))
    phases = math.prod(stride)
    codes = reordered.reshape(groups * outputs * phases, -1, *taps).contiguous()

    def repeated(x: Tensor) -> Tensor:
        return x if x.ndim == 0 else x.repeat_interleave(phases)

    grid = layer.weight_grid
    return replace(
        layer,
        op=TABLE[f"conv{axes}d"],
        arguments=([1] * axes, [t - 1 for t in taps], [1] * axes, groups),
        weight=codes,
        weight_grid=replace(
            grid, scale=repeated(grid.scale), axis=None if grid.axis is None else 0
        ),
        scale=repeated(layer.scale),
        unfolding=Unfolding(tuple(stride), tuple(padding), tuple(t - 1 for t in taps)),
    )


def _bounds(node: fx.Node, op: Op) -> tuple[float, float] | None:
    if op.name == "relu":
        return 0.0, float("inf")
    if op.name == "relu6":
        return 0.0, 6.0
    lower, upper = node.args[1:3]
    if not all(v is None or isinstance(v, int | float) for v in (lower, upper)):
        return None
    return (
        float("-inf") if lower is None else float(cast(float, lower)),
        float("inf") if upper is None else float(cast(float, upper)),
    )


def _code(value: float, grid: Grid) -> int:
    if value == float("inf"):
        return grid.qmax
    if value == float("-inf"):
        return grid.qmin
    return int(encode(torch.tensor(value, dtype=torch.float32), grid))


def _clipped_range(grid: Grid, clip: Clip) -> tuple[int, int]:
    low, high = _code(clip.lower, grid), _code(clip.upper, grid)
    return min(max(grid.qmin, low), grid.qmax), max(min(grid.qmax, high), grid.qmin)


def _representable(grid: Grid, lower: float, upper: float) -> bool:
    """True where both bounds are on the grid or outside its range."""
    scale = float(grid.scale)
    smallest = (grid.qmin - grid.zero_point) * scale
    largest = (grid.qmax - grid.zero_point) * scale
    return (lower <= smallest or lower == 0.0) and (upper >= largest or upper == 0.0)


def _inside(narrow: Grid, wide: Grid) -> bool:
    return wide.qmin <= narrow.qmin and narrow.qmax <= wide.qmax
