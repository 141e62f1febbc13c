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
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

import sqakd_fx.integer_ops  # noqa: F401  (registers torch.ops.sqakd_fx)
from sqakd_fx.batch_norm import Absorbed, AbsorbedBatchNorm, RoundedBias, absorb, affine_of
from sqakd_fx.compiler import Note, PassResult
from sqakd_fx.errors import PassError
from sqakd_fx.graphs import constant_of, get_attribute, module_path, set_attribute
from sqakd_fx.grid import Grid, encode
from sqakd_fx.ops import Kind, Op, op_of, shape_of
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
            if isinstance(value, Codes):
                return replace(value, node=self._on_codes(node, {source: value}))
        if op.kind is Kind.JOINT:
            return self._joint(node)
        return None

    # -- quantizers ------------------------------------------------------------------------

    def _quantizer(self, node: fx.Node, module: Quantizer) -> Any:
        if module.role == "weight":
            return node
        scale, zero_point, grid = self._grid(str(node.target), module)
        source = node.args[0]
        assert isinstance(source, fx.Node)
        value = self.values[source]
        name = str(node.target).removesuffix(".output_quantizer")
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
            code = self._drop_axes(value, code)
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
                    self._float(source),
                    self._read(scale),
                    self._read(zero_point),
                    grid.qmin,
                    grid.qmax,
                ),
            )
        if isinstance(value, Layer):
            grid = replace(grid, qmin=qmin, qmax=qmax)
        return Codes(self._tag(code, name, grid, module), grid, scale, zero_point)

    def _tag(self, node: fx.Node, name: str, grid: Grid, module: Quantizer) -> fx.Node:
        node.meta["quantized_tensor"] = {
            "name": name,
            "bits": grid.bits,
            "qmin": grid.qmin,
            "qmax": grid.qmax,
            "family": module.family.name,
        }
        return node

    def _grid(self, target: str, module: Quantizer) -> tuple[str, str, Grid]:
        if target not in self.grids:
            grid = module.grid()
            grid = replace(grid, scale=grid.scale.cpu())
            stem = target.removesuffix(".output_quantizer")
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
        scale = x.grid.scale * grid.scale
        bias = None
        rounding = node.args[2]
        if isinstance(rounding, fx.Node) and rounding.op == "call_module":
            value = self._constant(rounding.args[0]).float().cpu()
            at = absorb(torch.ones_like(value), value, x.grid.scale, grid.scale)
            codes, grid, scale, bias = _apply(codes, grid, at, op)
        return Layer(node, op, (x,), tuple(node.args[3:]), codes, grid, scale, bias)

    def _constant(self, node: Any) -> Tensor:
        value = constant_of(self.student, node)
        assert value is not None
        return value.detach()

    def _absorbed(self, node: fx.Node, module: AbsorbedBatchNorm) -> Any:
        source = cast(fx.Node, node.args[0])
        layer = self.values[source]
        assert isinstance(layer, Layer)
        assert layer.weight is not None
        assert layer.weight_grid is not None
        a, b = (t.detach().float().cpu() for t in affine_of(module.batch_norm))
        if len(node.args) > 2:
            b = b + a * self._constant(node.args[2]).float().cpu()
        at = absorb(a, b, layer.inputs[0].grid.scale, layer.weight_grid.scale)
        codes, grid, scale, bias = _apply(layer.weight, layer.weight_grid, at, layer.op)
        return replace(layer, weight=codes, weight_grid=grid, scale=scale, bias=bias)

    def _accumulator(self, layer: Layer) -> fx.Node:
        key = ("accumulator", layer.source, layer.bias is None, id(layer.weight))
        if key in self.floats:
            return self.floats[key]
        path = _path(layer.source)
        grids = self._grid_arguments(layer.inputs)
        if layer.weight is None:
            node = self.graph.call_function(_OPS.matmul.default, grids)
        else:
            assert layer.weight_grid is not None
            weight = self._buffer(f"{path}.weight", layer.weight)
            weight.meta["quantized_tensor"] = {
                "name": f"{path}.weight",
                "bits": layer.weight_grid.bits,
                "qmin": int(layer.weight.min()),
                "qmax": int(layer.weight.max()),
                "family": layer.source.meta["layer"].weight_family,
                "granularity": "tensor" if layer.weight_grid.axis is None else "channel",
            }
            bias = None if layer.bias is None else self._buffer(f"{path}.bias", layer.bias)
            arguments = (
                *grids,
                weight,
                self._buffer(f"{path}.weight_scale", layer.weight_grid.scale),
                self._buffer(f"{path}.accumulator_scale", layer.scale),
                bias,
                *_as_lists(layer.arguments),
            )
            target = _TARGETS[layer.op.name.rstrip("123d")]
            node = self.graph.call_function(target, arguments)
        node.meta["source"] = path
        self.floats[key] = node
        return node

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
                (kernel, kernel, [0] * axes, False, True),
            )
        settings = self._pool_settings(node, axes)
        if settings is None:
            return None
        return Arithmetic(node, _OPS.average_pool.default, (x,), settings)

    def _pool_settings(self, node: fx.Node, axes: int) -> tuple[Any, ...] | None:
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
        spread = [
            [v] * axes if isinstance(v, int) else list(v) * (axes if len(v) == 1 else 1)
            for v in (found["kernel_size"], found["stride"], found["padding"])
        ]
        return (*spread, bool(found["ceil_mode"]), bool(found["count_include_pad"]))

    def _drop_axes(self, value: Arithmetic, node: fx.Node) -> fx.Node:
        return node if value.keep_axes else self.graph.call_function(torch.flatten, (node, 1))

    # -- clips and moves -------------------------------------------------------------------

    def _clip(self, node: fx.Node, op: Op) -> Any:
        lower, upper = _bounds(node, op)
        source = cast(fx.Node, node.args[0])
        value = self.values[source]
        if lower is None:
            return None
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
            return self._float_clip(new, value.clip)
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
        return new

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
        key = ("buffer", wanted)
        if key not in self.floats:
            name = set_attribute(self.lowered, wanted, value.detach().cpu().clone())
            self.floats[key] = self._read(name)
        return self.floats[key]

    def _read(self, name: str) -> fx.Node:
        if name not in self.attributes:
            self.attributes[name] = self.graph.get_attr(name)
        return self.attributes[name]


_TARGETS = {
    "conv": _OPS.conv.default,
    "conv_transpose": _OPS.conv_transpose.default,
    "linear": _OPS.linear.default,
}


def _default(node: fx.Node) -> Any:
    return node.args[0] if node.args else inspect.Signature.empty


def _path(node: fx.Node) -> str:
    return module_path(node) or node.name


def _as_lists(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(list(a) if isinstance(a, tuple) else a for a in arguments)


def _accumulator_axis(layer: Layer) -> int:
    return -1 if layer.op.name in ("linear", "matmul") else 1


def _apply(codes: Tensor, grid: Grid, at: Absorbed, op: Op) -> tuple[Tensor, Grid, Tensor, Tensor]:
    """Weight codes, weight grid, accumulator scale and bias of a layer with an affine absorbed."""
    shape = [1] * codes.ndim
    shape[op.channel_axis] = -1
    grouped = op.channel_axis == 1 and codes.shape[1] != at.unit.numel()
    if grouped:
        uniform = bool((at.unit == at.unit[0]).all() and (at.sign == 1).all() and not at.dead.any())
        if not uniform:
            raise PassError("a grouped transposed convolution cannot absorb a BatchNorm")
        return codes, grid, at.unit[0], at.bias.to(torch.int32)
    keep = torch.where(at.dead, 0.0, at.sign).to(torch.int8).reshape(shape)
    plain = bool((at.sign == 1).all()) and grid.axis is None and bool((at.unit == at.unit[0]).all())
    scale = at.unit[0] if plain else at.unit
    new = replace(
        grid,
        scale=at.weight_scale[0] if plain else at.weight_scale,
        axis=grid.axis if plain else op.channel_axis,
    )
    return codes * keep, new, scale, at.bias.to(torch.int32)


def _bounds(node: fx.Node, op: Op) -> tuple[float, float] | tuple[None, None]:
    if op.name == "relu":
        return 0.0, float("inf")
    if op.name == "relu6":
        return 0.0, 6.0
    lower, upper = node.args[1:3]
    if not all(v is None or isinstance(v, int | float) for v in (lower, upper)):
        return None, None
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
