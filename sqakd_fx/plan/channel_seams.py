"""Where the size of a channel can move from what writes a tensor into the weights that read it.

    Before:  y = W2 f(W1 x + b1)
    After:   y = (W2 S) f(S⁻¹ W1 x + S⁻¹ b1)         S diagonal and positive, f(s x) = s f(x)

A seam is such a place: a convolution, a linear layer, a normalization or a product with a constant writes channels;
only convolutions and linear layers read them, behind operations that keep the ratio of a channel's values. Which
channel an element belongs to is not looked up in patterns. A tensor of channel numbers is sent through the graph in
place of the values, so views, heads of an attention, concatenations and shuffles need no rule of their own.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from sqakd_fx.ir.op_table import Kind, Op, op_of, shape_of
from sqakd_fx.ir.pass_manager import Note
from sqakd_fx.ir.rewriting import get_attribute
from sqakd_fx.plan.channel_labels import FIXED, Refusal, input_channels, label_behind

_LONGEST_WALK = 200


@dataclass(frozen=True, eq=False)
class Part:
    """A parameter, and the channel of each of its elements: int64, broadcast to its shape, `FIXED` for none."""

    target: str
    channel: Tensor


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer that reads channels; `channel` is that of each of its input channels, int64 of shape (inputs,)."""

    layer: fx.Node
    weight: Part
    channel: Tensor


@dataclass(frozen=True, eq=False)
class Seam:
    """Channels that `source` writes and `readers` read.

    Attributes:
        source: the node that writes `channels` channels.
        written: the parameters that a channel's size divides.
        readers: the layers whose weights it multiplies.
        rows: the weight whose rows become the channels, None behind a normalization or a product.
        batch_norm: the path of the BatchNorm between those rows and the channels.
    """

    source: fx.Node
    channels: int
    written: tuple[Part, ...]
    readers: tuple[Reader, ...]
    rows: Part | None
    batch_norm: str | None

    @property
    def is_normalization(self) -> bool:
        return self.rows is None


def find_seams(graph_module: fx.GraphModule) -> tuple[list[Seam], list[Note]]:
    """The seams of a canonical graph with shapes, in graph order, and why other layers end in none."""
    return _Search(graph_module).run()


@torch.no_grad()
def rescale(graph_module: fx.GraphModule, seam: Seam, size: Tensor) -> None:
    """Divide what is written by `size`, positive of shape (channels,), and multiply what reads it."""
    for part in seam.written:
        value = get_attribute(graph_module, part.target)
        value.copy_(value / _spread(size, part.channel))
    for reader in seam.readers:
        value = get_attribute(graph_module, reader.weight.target)
        value.copy_(value * _spread(size, reader.weight.channel))


def largest_weights(graph_module: fx.GraphModule, part: Part, channels: int) -> Tensor:
    """The largest magnitude of a parameter in each channel, float32 of shape (channels,); 0 where it has none."""
    value = get_attribute(graph_module, part.target).detach().abs().float()
    return largest_of(value, part.channel, channels)


def largest_of(value: Tensor, channel: Tensor, channels: int) -> Tensor:
    """The largest of the non-negative `value` in each channel; `channel` is broadcast to its shape."""
    index = channel.to(value.device).expand(value.shape).reshape(-1) + 1
    largest = value.new_zeros(channels + 1)
    return largest.scatter_reduce(0, index, value.reshape(-1), "amax")[1:]


def _spread(size: Tensor, channel: Tensor) -> Tensor:
    """The size of each element's channel, 1 for those of none."""
    return torch.cat([size.new_ones(1), size])[channel.to(size.device) + 1]


class _Search:
    """One search: a walk from every node that writes channels."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.modules = dict(graph_module.named_modules())
        self.nodes = list(graph_module.graph.nodes)
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.ops = {node: op_of(node, self.modules) for node in self.nodes}
        self.reads = _reads_of_memory(graph_module)

    def run(self) -> tuple[list[Seam], list[Note]]:
        seams, notes = [], []
        for node in self.nodes:
            try:
                found = self._seam(node)
            except Refusal as refusal:
                notes.append(Note(node.name, f"the sizes of its channels stay: {refusal}"))
                continue
            if found is not None:
                seams.append(found)
        return seams, notes

    def _seam(self, node: fx.Node) -> Seam | None:
        writer = self._writer(node)
        if writer is None:
            return None
        written, channel, rows, batch_norm = writer
        channels = int(channel.max()) + 1
        kept = torch.ones(channels, dtype=torch.bool)
        first: Refusal | None = None
        while True:
            label = torch.where(kept[channel], channel, FIXED).expand(shape_of(node) or ())
            try:
                walk = _Walk(self, node, label)
                break
            except Refusal as refusal:
                first = first or refusal
                lost = refusal.channels if refusal.channels is not None else channel
                kept[lost[lost >= 0]] = False
                if not kept.any():
                    raise first from None
        if not walk.readers:
            return None
        parts = [Part(p.target, torch.where(kept[p.channel], p.channel, FIXED)) for p in written]
        return Seam(
            node, channels, (*parts, *walk.constants), tuple(walk.readers), rows, batch_norm
        )

    def _writer(self, node: fx.Node) -> tuple[list[Part], Tensor, Part | None, str | None] | None:
        """What a node writes channels with: its parameters, the channels of its output, its rows, its BatchNorm."""
        op, shape = self.ops[node], shape_of(node)
        if op is None or shape is None or not node.users:
            return None
        if op.kind is Kind.COMPUTE and op.weight is not None and node.op == "call_function":
            users = [self.ops[user] for user in node.users]
            if any(user is not None and user.kind is Kind.BATCH_NORM for user in users):
                return None
            rows = self._rows(node, op)
            if rows is None:
                return None
            axis = 1 if op.is_convolution else len(shape) - 1
            channel = _along(axis, shape)
            written = [rows]
            if node.args[2] is not None:
                written.append(Part(self._own(node.args[2]), torch.arange(shape[axis])))
            return written, channel, rows, None
        if op.kind is Kind.BATCH_NORM and node.op == "call_module":
            layer = node.all_input_nodes[0]
            layer_op = self.ops[layer]
            rows = None
            if layer_op is not None and layer_op.weight is not None and len(layer.users) == 1:
                rows = self._rows(layer, layer_op)
            count = shape[1] if len(shape) > 1 else 0
            path = str(node.target)
            written = self._affine(path, torch.arange(count))
            return written, _along(1, shape), rows, path if rows is not None else None
        if op.normalizes_features:
            return self._of_normalization(node, shape)
        if op.kind is Kind.PRODUCT and node.op == "call_function":
            return self._of_product(node, shape)
        return None

    def _of_normalization(
        self, node: fx.Node, shape: tuple[int, ...]
    ) -> tuple[list[Part], Tensor, None, None]:
        channel = torch.arange(shape[-1])
        if node.op == "call_module":
            written = self._affine(str(node.target), channel)
        else:
            given = dict(
                zip(("input", "normalized_shape", "weight", "bias"), node.args, strict=False)
            )
            given |= node.kwargs
            if given.get("weight") is None:
                raise Refusal("the normalization has no weight of its own")
            written = [
                Part(self._own(given[key]), channel)
                for key in ("weight", "bias")
                if given.get(key) is not None
            ]
        if any(
            get_attribute(self.graph_module, part.target).shape != channel.shape for part in written
        ):
            raise Refusal("it normalizes over several axes")
        return written, _along(len(shape) - 1, shape), None, None

    def _of_product(
        self, node: fx.Node, shape: tuple[int, ...]
    ) -> tuple[list[Part], Tensor, None, None] | None:
        constant = [a for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr"]
        if len(constant) != 1:
            return None
        value = get_attribute(self.graph_module, str(constant[0].target))
        if not isinstance(value, nn.Parameter) or value.numel() != max(value.shape, default=0):
            return None
        if value.numel() < 2 or value.ndim > len(shape):
            return None
        channel = torch.arange(value.numel()).reshape(value.shape)
        return [Part(self._own(constant[0]), channel)], channel, None, None

    def _rows(self, node: fx.Node, op: Op) -> Part | None:
        """The weight of a layer by output channel; None where it is computed or read elsewhere as well."""
        assert op.weight is not None
        weight = node.args[op.weight]
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            return None
        target, shape = self._own(weight), shape_of(weight) or ()
        groups = int(node.args[6]) if op.channel_axis == 1 else 1  # type: ignore[arg-type]
        rest = [1] * (len(shape) - 2)
        if op.channel_axis == 0:
            return Part(target, torch.arange(shape[0]).reshape(-1, 1, *rest))
        channel = torch.arange(groups * shape[1]).reshape(groups, 1, shape[1])
        return Part(
            target, channel.expand(-1, shape[0] // groups, -1).reshape(shape[0], shape[1], *rest)
        )

    def _affine(self, path: str, channel: Tensor) -> list[Part]:
        module = self.modules[path]
        parts = []
        for key in ("weight", "bias"):
            value = getattr(module, key, None)
            if value is None:
                if key == "weight":
                    raise Refusal("the normalization has no weight of its own")
                continue
            if self.reads[_memory(value)] > 1:
                raise Refusal("its parameters are used more than once")
            parts.append(Part(f"{path}.{key}", channel))
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and len(parts) < 2:
            raise Refusal("the normalization has no bias of its own")
        return parts

    def _own(self, node: object) -> str:
        """The target of a parameter that nothing else reads."""
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            raise Refusal("one of its parameters is computed from data")
        value = get_attribute(self.graph_module, str(node.target))
        if self.reads[_memory(value)] > 1:
            raise Refusal(f"{node.target} is used more than once")
        return str(node.target)

    def own_constant(self, node: fx.Node, label: Tensor) -> Part:
        """A constant that is added to channels, with the channel of each of its elements."""
        target = self._own(node)
        value = get_attribute(self.graph_module, target)
        shape = (1,) * (label.ndim - value.ndim) + tuple(value.shape)
        channel = label
        for axis, size in enumerate(shape):
            if size == 1 and channel.shape[axis] > 1:
                if bool((channel != channel.narrow(axis, 0, 1)).any()):
                    raise Refusal(f"{target} is one number for several channels")
                channel = channel.narrow(axis, 0, 1)
        return Part(target, channel.reshape(value.shape).clone())

    def reader(self, node: fx.Node, op: Op, label: Tensor) -> Reader:
        """A layer that reads channels, which `label` numbers in its input."""
        assert op.weight is not None
        axis = 1 if op.is_convolution else label.ndim - 1
        channel = input_channels(label, axis)
        if channel is None:
            raise Refusal(f"{node.name} reads several channels as one", label)
        target = self._own(node.args[op.weight])
        shape = shape_of(node.args[op.weight]) or ()  # type: ignore[arg-type]
        rest = [1] * (len(shape) - 2)
        if op.channel_axis == 1:
            return Reader(node, Part(target, channel.reshape(-1, 1, *rest)), channel)
        groups = int(node.args[6]) if op.is_convolution else 1  # type: ignore[arg-type]
        by_row = channel.reshape(groups, 1, -1).expand(-1, shape[0] // groups, -1)
        return Reader(node, Part(target, by_row.reshape(shape[0], -1, *rest)), channel)


class _Walk:
    """Channel numbers sent from a source to the layers that read them; raises Refusal where they cannot go on."""

    def __init__(self, search: _Search, source: fx.Node, label: Tensor) -> None:
        self.search = search
        self.readers: list[Reader] = []
        self.constants: list[Part] = []
        self.labels: dict[fx.Node, object] = {source: label}
        self.waiting: list[int] = []
        self._wait_for(source)
        steps = 0
        while self.waiting:
            node = search.nodes[heapq.heappop(self.waiting)]
            if node in self.labels:
                continue
            steps += 1
            if steps > _LONGEST_WALK:
                raise Refusal(f"more than {_LONGEST_WALK} operations read them")
            self._visit(node)

    def _wait_for(self, node: fx.Node) -> None:
        for user in node.users:
            heapq.heappush(self.waiting, self.search.position[user])

    def _visit(self, node: fx.Node) -> None:
        op = self.search.ops[node]
        given = {
            source: self.labels[source]
            for source in node.all_input_nodes
            if any(bool((x >= 0).any()) for x in _tensors(self.labels.get(source)))
        }
        if not given:
            return
        labels = [x for one in given.values() for x in _tensors(one)]
        if op is not None and op.kind is Kind.SHAPE:
            return
        try:
            reads_weight = op is not None and op.kind is Kind.COMPUTE and op.weight is not None
            if reads_weight and op is not None and list(given) == [node.args[0]]:
                (label,) = labels
                self.readers.append(self.search.reader(node, op, label))
                return
            constant = _added_constant(node, op)
            if constant is not None and len(labels) == 1:
                self.constants.append(self.search.own_constant(constant, labels[0]))
                self.labels[node] = labels[0].expand(shape_of(node) or ())
            else:
                self.labels[node] = label_behind(node, op, given, self.search.modules)
        except Refusal as refusal:
            if refusal.channels is None:
                refusal.channels = torch.cat([x.reshape(-1) for x in labels])
            raise
        self._wait_for(node)


def _added_constant(node: fx.Node, op: Op | None) -> fx.Node | None:
    """The constant among the terms of a sum."""
    if op is None or op.kind is not Kind.SUM:
        return None
    return next((a for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr"), None)


def _tensors(label: object) -> Iterator[Tensor]:
    if isinstance(label, Tensor):
        yield label
    elif isinstance(label, tuple | list):
        for one in label:
            yield from _tensors(one)


def _along(axis: int, shape: tuple[int, ...]) -> Tensor:
    """The position along an axis, of a shape that broadcasts to `shape`."""
    return torch.arange(shape[axis]).reshape([-1 if i == axis else 1 for i in range(len(shape))])


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _reads_of_memory(graph_module: fx.GraphModule) -> Counter[int]:
    """How many nodes read each parameter's memory, by whatever name."""
    reads: Counter[int] = Counter()
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            value = get_attribute(graph_module, str(node.target))
            if isinstance(value, Tensor):
                reads[_memory(value)] += len(node.users)
        elif node.op == "call_module":
            module = graph_module.get_submodule(str(node.target))
            reads.update(_memory(value) for value in module.parameters())
    return reads
