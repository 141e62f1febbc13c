"""A torch.export program in `quantized_decomposed` operations, which ExecuTorch and LiteRT lower to integer kernels.

    Before:  codes = sqakd_fx.requantize(sqakd_fx.conv(codes, ...), ...) → max_pool of codes
    After:   x = dequantize(quantize(conv(x, dequantize(weight), bias))) → max_pool of floats

What was codes is the floats that they stand for, behind a pair of quantize and dequantize where an integer operation
reads it. Codes are INT8: a code q of the integer program is q - 128 here, and so is its zero point. A range of fewer
codes is a clamp of floats between two pairs of the same grid. Biases are float.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from torch import Tensor, fx
from torch.nn import functional as F

from sqakd_fx.errors import ExportError
from sqakd_fx.ir.copying import deep_copy
from sqakd_fx.ir.integer_ops import both_ends, dequantize_weight, sides
from sqakd_fx.ir.quantized_tensors import is_own_operation
from sqakd_fx.ir.rewriting import constant_of, drop_unused, set_attribute

_Q = torch.ops.quantized_decomposed
_LEAST, _MOST = -128, 127
_FROM_UNSIGNED = 128


@dataclass(frozen=True)
class _Grid:
    """An 8-bit grid: its scale, its zero point among unsigned codes, and the codes that are used."""

    scale: float
    zero_point: int
    qmin: int = 0
    qmax: int = 255

    def real(self, code: int) -> float:
        return float(torch.tensor(code - self.zero_point, dtype=torch.float32) * self.scale)


@dataclass(frozen=True)
class _Value:
    """A tensor of the new graph: floats, on a grid where it was codes, and whether it comes from a pair."""

    node: Any
    grid: _Grid | None = None
    is_pair: bool = False


def decomposed(lowered: fx.GraphModule, example: Sequence[Any]) -> fx.GraphModule:
    """The integer program on floats between pairs of `quantized_decomposed` operations.

    Raises:
        ExportError: an operation on codes has no such form.
    """
    made = deep_copy(lowered)
    made.graph = fx.Graph()
    build = _Builder(lowered, made, _ranks(lowered, example))
    for node in lowered.graph.nodes:
        build.take(node)
    made.graph.eliminate_dead_code()
    _give_each_reader_its_own_dequantize(made.graph)
    drop_unused(made)
    _drop_codes_beside_modules(made)
    for stored in (*made.parameters(), *made.buffers()):  # XNNPACK refuses channels last
        stored.data = stored.data.contiguous()
    made.recompile()
    return made


def _drop_codes_beside_modules(made: fx.GraphModule) -> None:
    """Codes and zero points that nothing reads any more, where a module that is called holds them."""
    read = {str(node.target) for node in made.graph.find_nodes(op="get_attr")}
    for name, stored in list(made.named_buffers()):
        if name not in read and stored.dtype in (torch.uint8, torch.int8):
            owner, _, key = name.rpartition(".")
            del made.get_submodule(owner)._buffers[key]


def _give_each_reader_its_own_dequantize(graph: fx.Graph) -> None:
    """As PyTorch's own export quantization does: a backend takes a layer with what dequantizes its inputs."""
    for target in (_Q.dequantize_per_tensor.default, _Q.dequantize_per_channel.default):
        for node in graph.find_nodes(op="call_function", target=target):
            for reader in list(node.users)[1:]:
                with graph.inserting_after(node):
                    own = graph.node_copy(node)
                reader.replace_input_with(node, own)


def _ranks(lowered: fx.GraphModule, example: Sequence[Any]) -> dict[fx.Node, int]:
    """Of what is averaged over all its axes behind the channels: the number of axes."""
    read = [
        node.args[0]
        for node in lowered.graph.find_nodes(
            op="call_function", target=torch.ops.sqakd_fx.global_average_pool.default
        )
    ]
    if not read:
        return {}
    running = fx.Interpreter(lowered, garbage_collect_values=False)
    with torch.no_grad():
        running.run(*example)
    return {node: running.env[node].ndim for node in read}


class _Builder:
    """Copies a lowered graph node by node; `values` holds what each node became."""

    def __init__(
        self, lowered: fx.GraphModule, made: fx.GraphModule, ranks: dict[fx.Node, int]
    ) -> None:
        self.lowered, self.made, self.ranks = lowered, made, ranks
        self.values: dict[fx.Node, _Value] = {}
        self.pairs: dict[fx.Node, fx.Node] = {}

    def take(self, node: fx.Node) -> None:
        if is_own_operation(node):
            name = str(node.target).split(".")[1]
            if name not in _TRANSLATIONS:
                raise ExportError(
                    f"{name} ({node.name}) has no form in quantized_decomposed operations: "
                    "leave its layer in float with an override"
                )
            self.values[node] = _TRANSLATIONS[name](self, node)
        else:
            self.values[node] = self._copied(node)

    def _copied(self, node: fx.Node) -> _Value:
        """An operation of torch's on what its inputs became; where it moves codes, the result is on their grid."""
        sources = [self.values[source] for source in node.all_input_nodes if source in self.values]
        grid = next((one.grid for one in sources if one.grid is not None), None)
        if node.op in ("output", "placeholder", "get_attr"):
            return _Value(self.made.graph.node_copy(node, lambda n: self.values[n].node))

        def given(source: fx.Node) -> Any:
            if grid is not None and source.op == "get_attr":
                return self.floats(source, grid)
            return self.values[source].node

        new = self.made.graph.node_copy(node, given)
        if grid is not None and node.target is F.pad:
            new.kwargs = {**new.kwargs, "value": grid.real(cast(int, node.kwargs["value"]))}
        return _Value(new, grid if _may_hold_codes(node) else None)

    def floats(self, codes: fx.Node, grid: _Grid) -> Any:
        """What codes stand for, of a tensor that is stored as well; of anything else what it became."""
        stored = constant_of(self.lowered, codes)
        if stored is not None and stored.dtype == torch.uint8:
            real = (stored.float() - grid.zero_point) * grid.scale
            return self.constant(f"{codes.target}_float", real)
        return self.values[codes].node

    def tensor(self, node: fx.Node) -> Tensor:
        """A stored scale, zero point, weight or bias."""
        value = constant_of(self.lowered, node)
        if value is None:
            raise ExportError(
                f"{node.name} is computed, not stored: this profile cannot hold it as a scale or a weight"
            )
        return value

    def grid(self, scale: fx.Node, zero_point: fx.Node, qmin: int = 0, qmax: int = 255) -> _Grid:
        return _Grid(float(self.tensor(scale)), int(self.tensor(zero_point)), qmin, qmax)

    def constant(self, name: str, value: Tensor) -> fx.Node:
        stored = set_attribute(self.made, name, value)
        return self.made.graph.get_attr(stored)

    def call(self, target: Callable[..., Any], *arguments: Any, **named: Any) -> fx.Node:
        return self.made.graph.call_function(target, arguments, named)

    def on_grid(self, x: fx.Node, grid: _Grid, name: str) -> _Value:
        """`x` on a grid, then clamped to its range and on the grid again, which changes no code.

        XNNPACK takes a layer with the pair behind it. A clamp between them leaves the layer to a kernel of floats.
        """
        if (grid.qmin, grid.qmax) != (0, 255):
            wide = self.pair(x, grid, f"{name}_wide")
            x = self.call(torch.clamp, wide, grid.real(grid.qmin), grid.real(grid.qmax))
        return _Value(self.pair(x, grid, name), grid, is_pair=True)

    def pair(self, x: fx.Node, grid: _Grid, name: str) -> fx.Node:
        numbers = (grid.scale, grid.zero_point - _FROM_UNSIGNED, _LEAST, _MOST, torch.int8)
        codes = self.made.graph.create_node(
            "call_function", _Q.quantize_per_tensor.default, (x, *numbers), name=name
        )
        return self.call(_Q.dequantize_per_tensor.default, codes, *numbers)

    def read(self, node: fx.Node, scale: fx.Node, zero_point: fx.Node) -> fx.Node:
        """What an integer operation reads: floats behind a pair; moved ones get a pair of the same grid."""
        value = self.values[node]
        if value.is_pair:
            return cast(fx.Node, value.node)
        if node not in self.pairs:
            grid = self.grid(scale, zero_point)
            if value.grid is None and constant_of(self.lowered, node) is None:
                raise ExportError(
                    f"{node.name} moves stored codes, which has no form in quantized_decomposed operations: leave what "
                    "reads it in float with an override"
                )
            self.pairs[node] = self.pair(self.floats(node, grid), grid, f"{node.name}_moved")
        return self.pairs[node]

    def weight(self, codes: fx.Node, scale: fx.Node, axis: int) -> fx.Node:
        """INT8 codes behind a dequantize; a scale for each index of an axis, or one."""
        stored = self.values[codes].node
        if self.tensor(scale).ndim == 0:
            one = (float(self.tensor(scale)), 0, _LEAST, _MOST, torch.int8)
            return self.call(_Q.dequantize_per_tensor.default, stored, *one)
        scales = self.values[scale].node
        zeros = torch.zeros_like(self.tensor(scale), dtype=torch.int64)
        points = self.constant(f"{codes.target}_zero_point", zeros)
        axis %= self.tensor(codes).ndim
        numbers = (scales, points, axis, _LEAST, _MOST, torch.int8)
        return self.call(_Q.dequantize_per_channel.default, stored, *numbers)

    def float_weight(self, codes: fx.Node, scale: fx.Node) -> fx.Node:
        """What the codes of a weight stand for; a scale for each index of the first axis, or one."""
        real = dequantize_weight(self.tensor(codes), self.tensor(scale), 0)
        return self.constant(f"{codes.target}_float", real)

    def bias(self, bias: Any, scale: fx.Node) -> fx.Node | None:
        if bias is None:
            return None
        real = self.tensor(bias).to(torch.float32) * self.tensor(scale)
        return self.constant(f"{bias.target}_float", real)


def _may_hold_codes(node: fx.Node) -> bool:
    """Whether what a move of codes gives can be codes: sizes and shapes are none."""
    return not (node.op == "call_method" and node.target in ("size", "dim", "numel"))


def _arguments(node: fx.Node) -> list[Any]:
    """The arguments of an operation of the integer program, in its order."""
    return list(node.args)


def _quantize(build: _Builder, node: fx.Node) -> _Value:
    x, scale, zero_point, qmin, qmax = _arguments(node)
    return build.on_grid(build.values[x].node, build.grid(scale, zero_point, qmin, qmax), node.name)


def _dequantize(build: _Builder, node: fx.Node) -> _Value:
    codes, scale, zero_point = _arguments(node)
    return _Value(build.floats(codes, build.grid(scale, zero_point)))


def _dequantize_accumulator(build: _Builder, node: fx.Node) -> _Value:
    return _Value(build.values[_arguments(node)[0]].node)


def _clip(build: _Builder, node: fx.Node) -> _Value:
    codes, qmin, qmax = _arguments(node)
    value = build.values[codes]
    assert value.grid is not None
    ends = (value.grid.real(qmin), value.grid.real(qmax))
    return replace(value, node=build.call(torch.clamp, value.node, *ends), is_pair=False)


def _conv(build: _Builder, node: fx.Node) -> _Value:
    x, scale, zero_point, weight, weight_scale, unit, bias, *how = _arguments(node)
    stride, padding, dilation, groups = how
    axes = build.tensor(weight).ndim - 2
    starts, ends = sides(padding, axes)
    function = (torch.ops.aten.conv1d, torch.ops.aten.conv2d, torch.ops.aten.conv3d)[axes - 1]
    layer = _layer_weight(build, node, weight, weight_scale)
    read = build.read(x, scale, zero_point)
    if starts != ends:  # torch's convolutions pad both sides alike
        padded = build.call(F.pad, read, both_ends(starts, ends))
        read = build.pair(padded, build.grid(scale, zero_point), f"{node.name}_padded")
        starts = [0] * axes
    how = [stride, starts, dilation, groups]
    return _Value(build.call(function.default, read, layer, build.bias(bias, unit), *how))


def _layer_weight(build: _Builder, layer: fx.Node, codes: fx.Node, scale: fx.Node) -> fx.Node:
    """INT8 where the layer's sums are rounded again, else the floats that the codes stand for.

    XNNPACK has no integer kernel for sums that stay in float. It is wrong about such a convolution with INT8 weights,
    and leaves such a linear layer to a kernel that takes 40 times as long.
    """
    if all(user.target is torch.ops.sqakd_fx.requantize.default for user in layer.users):
        return build.weight(codes, scale, 0)
    return build.float_weight(codes, scale)


def _linear(build: _Builder, node: fx.Node) -> _Value:
    x, scale, zero_point, weight, weight_scale, unit, bias = _arguments(node)
    layer = _layer_weight(build, node, weight, weight_scale)
    read = build.read(x, scale, zero_point)
    return _Value(build.call(torch.ops.aten.linear.default, read, layer, build.bias(bias, unit)))


def _two_read(build: _Builder, node: fx.Node) -> tuple[fx.Node, fx.Node]:
    a, a_scale, a_zero_point, b, b_scale, b_zero_point = _arguments(node)[:6]
    return build.read(a, a_scale, a_zero_point), build.read(b, b_scale, b_zero_point)


def _matmul(build: _Builder, node: fx.Node) -> _Value:
    return _Value(build.call(torch.matmul, *_two_read(build, node)))


def _arithmetic(function: Callable[..., Any]) -> Callable[[_Builder, fx.Node], _Value]:
    def translation(build: _Builder, node: fx.Node) -> _Value:
        made = build.call(function, *_two_read(build, node))
        return build.on_grid(made, build.grid(*_arguments(node)[6:10]), node.name)

    return translation


def _requantize(build: _Builder, node: fx.Node) -> _Value:
    return build.on_grid(
        build.values[_arguments(node)[0]].node, build.grid(*_arguments(node)[3:7]), node.name
    )


def _dequantize_weight(build: _Builder, node: fx.Node) -> _Value:
    return _Value(build.weight(*_arguments(node)))


def _look_up(build: _Builder, node: fx.Node) -> _Value:
    """Rows of codes, then what they stand for: a backend dequantizes a whole table at every call."""
    indices, codes, scale = _arguments(node)
    rows = build.values[indices].node
    found = build.call(F.embedding, rows, build.values[codes].node)
    real = build.made.graph.call_method("to", (found, torch.float32))
    scales = build.constant(f"{codes.target}_row_scale", build.tensor(scale)[:, None])
    return _Value(build.call(torch.mul, real, build.call(F.embedding, rows, scales)))


def _global_average_pool(build: _Builder, node: fx.Node) -> _Value:
    x, scale, zero_point, *made = _arguments(node)
    axes = list(range(2, build.ranks[x]))
    mean = build.call(torch.ops.aten.mean.dim, build.read(x, scale, zero_point), axes, True)
    return build.on_grid(mean, build.grid(*made), node.name)


def _average_pool(build: _Builder, node: fx.Node) -> _Value:
    x, scale, zero_point, *made = _arguments(node)[:7]
    kernel, stride, padding, end_padding, counts_pads = _arguments(node)[7:]
    if list(padding) != list(end_padding):
        raise ExportError(
            f"{node.name} pads more at one end, which has no form in quantized_decomposed operations: "
            "leave this average in float with an override"
        )
    function = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(kernel) - 1]
    read = build.read(x, scale, zero_point)
    mean = build.call(
        function, read, kernel, stride, padding, ceil_mode=False, count_include_pad=counts_pads
    )
    return build.on_grid(mean, build.grid(*made), node.name)


def _top_k(build: _Builder, node: fx.Node) -> _Value:
    x, k, dim, largest = _arguments(node)
    value = build.values[x]
    return replace(value, node=build.call(torch.topk, value.node, k, dim, largest), is_pair=False)


_TRANSLATIONS: dict[str, Callable[[_Builder, fx.Node], _Value]] = {
    "quantize": _quantize,
    "dequantize": _dequantize,
    "clip": _clip,
    "conv": _conv,
    "linear": _linear,
    "matmul": _matmul,
    "requantize": _requantize,
    "dequantize_accumulator": _dequantize_accumulator,
    "dequantize_weight": _dequantize_weight,
    "look_up": _look_up,
    "add": _arithmetic(torch.add),
    "sub": _arithmetic(torch.sub),
    "mul": _arithmetic(torch.mul),
    "global_average_pool": _global_average_pool,
    "average_pool": _average_pool,
    "top_k": _top_k,
}
"""By the name of an operation of the integer program."""
