"""The graph of the integer program while it is built: stored tensors, each once, and integer operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

import sqakd_fx.ir.integer_ops  # noqa: F401  (registers torch.ops.sqakd_fx)
from sqakd_fx.ir import meta
from sqakd_fx.ir.op_table import Op, shape_of
from sqakd_fx.ir.quantized_tensors import QuantizedTensor
from sqakd_fx.ir.rewriting import get_attribute, set_attribute
from sqakd_fx.passes.lower_to_integer.grouped import fast_form
from sqakd_fx.passes.lower_to_integer.padded import without_pad
from sqakd_fx.passes.lower_to_integer.values import Arithmetic, Codes, Layer, StoredGrid, Unfolding

_OPS = torch.ops.sqakd_fx


class LoweredGraph:
    """A graph module that grows; `module.graph` is where nodes are added."""

    def __init__(self) -> None:
        self.module = fx.GraphModule(nn.Module(), fx.Graph())
        self._reads: dict[str, fx.Node] = {}
        self._buffers: dict[str, list[tuple[str, Tensor]]] = {}
        self._weights: dict[str, list[fx.Node]] = {}
        self._accumulators: dict[Any, fx.Node] = {}

    def buffer(self, wanted: str, value: Tensor) -> fx.Node:
        """A stored tensor called `wanted`, or like it where another one has that name."""
        value = value.detach().cpu()
        stored = self._buffers.setdefault(wanted, [])
        for name, known in stored:
            if known.dtype == value.dtype and torch.equal(known, value):
                return self.read(name)
        name = set_attribute(self.module, wanted, value.clone())
        stored.append((name, value))
        return self.read(name)

    def weight(self, wanted: str, read: str, codes: Tensor) -> fx.Node:
        """Codes of the student's parameter `read`; those of another of its readers where they are equal."""
        for stored in self._weights.setdefault(read, []):
            self.share(wanted, stored)
        made = self.buffer(wanted, codes)
        self._weights[read].append(made)
        return made

    def share(self, wanted: str, stored: fx.Node) -> None:
        """A tensor that will be wanted by this name is the one that `stored` reads, if their values are equal."""
        name = str(stored.target)
        known = cast(Tensor, get_attribute(self.module, name))
        self._buffers.setdefault(wanted, []).append((name, known))

    def read(self, name: str) -> fx.Node:
        """The one node that reads a stored tensor."""
        if name not in self._reads:
            self._reads[name] = self.module.graph.get_attr(name)
        return self._reads[name]

    def grid_arguments(self, inputs: Sequence[Codes]) -> tuple[fx.Node, ...]:
        """Codes, scale and zero point of each tensor, as the integer operations take them."""
        return tuple(
            part for codes in inputs for part in (codes.node, *self.grid_parameters(codes.stored))
        )

    def grid_parameters(self, stored: StoredGrid) -> tuple[fx.Node, fx.Node]:
        """Scale and zero point."""
        return self.read(stored.scale), self.read(stored.zero_point)

    def bring_module(self, path: str, module: nn.Module) -> None:
        """Take over a module of the trained graph that stays in float."""
        try:
            self.module.get_submodule(path)
        except AttributeError:
            set_attribute(self.module, path, module)

    def quantized(self, value: Layer | Arithmetic, stored: StoredGrid) -> fx.Node:
        """The codes of a layer or a sum on the grid that waits behind it, not yet `shaped`."""
        grid = (*self.grid_parameters(stored), stored.grid.qmin, stored.grid.qmax)
        if isinstance(value, Layer):
            return self._call(
                _OPS.requantize.default,
                self._accumulator(value),
                self._accumulator_scale(value),
                value.op.accumulator_axis,
                *grid,
            )
        inputs = self.grid_arguments(value.inputs)
        return self._call(value.target, *inputs, *grid, *value.arguments)

    def dequantized(self, layer: Layer) -> fx.Node:
        """The float values of a layer, not yet `shaped`."""
        return self._call(
            _OPS.dequantize_accumulator.default,
            self._accumulator(layer),
            self._accumulator_scale(layer),
            layer.op.accumulator_axis,
        )

    def shaped(self, value: Layer | Arithmetic, node: fx.Node) -> fx.Node:
        """Codes or floats made of a value, in the shape of the trained graph's own output."""
        if isinstance(value, Arithmetic):
            return node if value.keep_axes else self._call(torch.flatten, node, 1)
        outs = shape_of(value.source) or ()
        if value.op.is_linear and len(outs) > 2:
            return self._call(torch.reshape, node, self._sizes(value, outs))
        if value.unfolding is None:
            return node
        ins = shape_of(cast(fx.Node, value.source.args[0])) or ()
        sizes = self._sizes_in_phases(value, value.unfolding, node)
        return value.unfolding.apply(self.module.graph, node, sizes, outs, ins)

    def _sizes_in_phases(
        self, layer: Layer, unfolding: Unfolding, node: fx.Node
    ) -> list[int | fx.Node]:
        """The batch and the spatial sizes of phases: numbers, or computed where they are free."""
        ins = shape_of(cast(fx.Node, layer.source.args[0])) or ()
        if not meta.free_axes(layer.source):
            return [-1, *(n + m for n, m in zip(ins[2:], unfolding.margin, strict=True))]
        axes = [0, *range(2, len(ins))]
        return [self.module.graph.call_method("size", (node, axis)) for axis in axes]

    def _sizes(self, layer: Layer, outs: Sequence[int]) -> list[int | fx.Node]:
        """The shape of a linear layer's output: numbers, -1 for the batch, the input's sizes where they are free."""
        sizes: list[int | fx.Node] = list(outs)
        sizes[(meta.batch_axes(layer.source) or (0,))[0]] = -1
        (x,) = layer.inputs
        for axis in meta.free_axes(layer.source):
            sizes[axis] = self.module.graph.call_method("size", (x.node, axis))
        return sizes

    def _call(self, target: Any, *arguments: Any) -> fx.Node:
        return self.module.graph.call_function(target, arguments)

    def _accumulator_scale(self, layer: Layer) -> fx.Node:
        return self.buffer(f"{_path(layer.source)}.accumulator_scale", layer.scale)

    def _accumulator(self, layer: Layer) -> fx.Node:
        """The int32 sums, made once for all who read them."""
        key = (layer.source, layer.bias is None, id(layer.weight))
        if key not in self._accumulators:
            made = (
                self._call(integer_operation(layer.op), *self.grid_arguments(layer.inputs))
                if layer.weight is None
                else self._weighted(*fast_form(layer))
            )
            meta.set_accumulator_source(made, _path(layer.source))
            self._accumulators[key] = made
        return self._accumulators[key]

    def _weighted(self, layer: Layer, channels: Tensor | None) -> fx.Node:
        """A layer with a weight that reads its input's channels as they are, or these."""
        assert layer.weight is not None
        assert layer.weight_grid is not None
        codes = layer.weight
        path = _path(layer.source)
        weight = self.weight(f"{path}.weight", _parameter(layer), codes)
        settings = meta.layer(layer.source)
        tensor = QuantizedTensor(
            path=f"{path}.weight",
            bits=layer.weight_grid.bits,
            qmin=int(codes.min()),
            qmax=int(codes.max()),
            family=settings.weight_family if settings else "affine",
            granularity="tensor" if layer.weight_grid.axis is None else "channel",
        )
        meta.set_quantized_tensor(weight, tensor)
        (x,) = layer.inputs
        if layer.op.is_linear and len(shape_of(layer.source) or ()) > 2:
            x = replace(x, node=self._call(torch.reshape, x.node, [-1, codes.shape[1]]))
        x, arguments = without_pad(x, layer.arguments)
        if channels is not None:
            read = self.buffer(f"{path}.channels", channels)
            x = replace(x, node=self._call(torch.index_select, x.node, 1, read))
        return self._call(
            integer_operation(layer.op),
            *self.grid_arguments((x,)),
            weight,
            self.buffer(f"{path}.weight_scale", layer.weight_grid.scale),
            self._accumulator_scale(layer),
            None if layer.bias is None else self.buffer(f"{path}.bias", layer.bias),
            *(list(a) if isinstance(a, tuple) else a for a in arguments),
        )


def _path(node: fx.Node) -> str:
    return meta.module_path(node) or node.name


def _parameter(layer: Layer) -> str:
    """The name of the student's parameter that a layer's codes are of; of an affine's own, the layer's."""
    assert layer.op.weight is not None
    read = layer.source.args[layer.op.weight : layer.op.weight + 1]
    sources = [x for one in read if isinstance(one, fx.Node) for x in (one, *one.all_input_nodes)]
    return next((str(x.target) for x in sources if x.op == "get_attr"), _path(layer.source))


def integer_operation(op: Op) -> Callable[..., Any]:
    """What computes a row of the op table in the integer program."""
    assert op.integer is not None
    operation: Callable[..., Any] = getattr(_OPS, op.integer).default
    return operation
