"""Which tensors are to be on a grid, how wide, and which share one: what `insert_quantizers` then does.

A layer wants its activations at its own bits; sums, products, averages and a BatchNorm that stands alone want
theirs at eight or more. A tensor takes the grid of what it is moved from, and tensors that meet in a
concatenation share one. What stays in float is noted with the reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import networkx as nx
from torch import fx, nn

from sqakd_fx.ir.meta import LayerSettings
from sqakd_fx.ir.op_table import Kind, Op, is_float32_tensor, op_of, shape_of
from sqakd_fx.ir.pass_manager import Note
from sqakd_fx.ir.rewriting import constant_of, reads_of
from sqakd_fx.plan.layer_settings import layer_settings, named_in_float
from sqakd_fx.plan.recurrent import stored_matrices
from sqakd_fx.plan.residual_streams import REASON, residual_streams
from sqakd_fx.plan.tables import table_target
from sqakd_fx.quant.batch_norm import is_batch_norm, sole_compute_input
from sqakd_fx.recipe.keys import Recipe
from sqakd_fx.targets import TARGETS

_LONGEST_SCORE = 16


@dataclass(frozen=True, eq=False)
class Region:
    """Tensors that share one quantizer of `bits`; `sources` are those that are not moved there, in graph order."""

    sources: tuple[fx.Node, ...]
    bits: int


@dataclass(frozen=True)
class QuantizerPlan:
    """What is to be quantized in a graph.

    Attributes:
        ops: the op of every node, None for what the table does not have.
        layers: settings of the layers that become integer.
        arithmetic: sums, products and averages that become integer, with their kind.
        affines: BatchNorms that become integer on their own.
        absorbed: by layer, the BatchNorm that becomes part of it.
        demands: by tensor, the bits that each of its consumers wants.
        regions: by tensor that is demanded or moved, its region.
        unquantized_reads: by tensor made in float, who reads it as it is although others read it on a grid.
        weight_only: settings of layers whose weight alone is on a grid.
        tables: by look-up, the attribute that holds the table whose rows become codes.
        recurrent: by recurrent layer, the attributes that hold the weights that become codes.
        notes: what stays in float, and why.
    """

    ops: Mapping[fx.Node, Op | None]
    layers: Mapping[fx.Node, LayerSettings]
    arithmetic: Mapping[fx.Node, Kind]
    affines: tuple[fx.Node, ...]
    absorbed: Mapping[fx.Node, fx.Node]
    demands: Mapping[fx.Node, Mapping[fx.Node, int]]
    regions: Mapping[fx.Node, Region]
    unquantized_reads: Mapping[fx.Node, frozenset[fx.Node]]
    weight_only: Mapping[fx.Node, LayerSettings]
    tables: Mapping[fx.Node, str]
    recurrent: Mapping[fx.Node, list[str]]
    notes: tuple[Note, ...]

    def tail(self, node: fx.Node) -> fx.Node:
        """The last node behind the BatchNorm that a layer absorbs and the clips that nobody else reads."""
        return _tail(node, self.ops, self.absorbed)


def plan_quantizers(graph_module: fx.GraphModule, recipe: Recipe) -> QuantizerPlan:
    """Read a traced graph with shapes; it is not changed."""
    return _Planning(graph_module, recipe).plan()


class _Planning:
    """Demands are collected along the graph, then regions formed."""

    def __init__(self, graph_module: fx.GraphModule, recipe: Recipe) -> None:
        self.graph_module = graph_module
        self.recipe = recipe
        self.modules = dict(graph_module.named_modules())
        self.nodes = list(graph_module.graph.nodes)
        self.ops = {node: op_of(node, self.modules) for node in self.nodes}
        self.reads = reads_of(graph_module.graph)
        self.calls = Counter(str(n.target) for n in self.nodes if n.op == "call_module")
        self.notes: list[Note] = []
        self.settings = layer_settings(graph_module, recipe, self.ops)
        self.named_in_float = named_in_float(recipe, self.ops)
        self.layers: dict[fx.Node, LayerSettings] = {}
        self.arithmetic: dict[fx.Node, Kind] = {}
        self.affines: dict[fx.Node, None] = {}
        self.demands: dict[fx.Node, dict[fx.Node, int]] = {}
        self.absorbed: dict[fx.Node, fx.Node] = {}
        self.integer: set[fx.Node] = set()
        self.tables: dict[fx.Node, str] = {}
        self.recurrent: dict[fx.Node, list[str]] = {}
        self.weight_only: dict[fx.Node, LayerSettings] = {}
        self.float_products: set[fx.Node] = set()
        floats = recipe.residual_streams == "float"
        self.streams = residual_streams(self.ops) if floats else set()

    def plan(self) -> QuantizerPlan:
        self._collect_demands()
        self._widen_what_float_layers_read()
        regions = self._regions()
        return QuantizerPlan(
            self.ops,
            self.layers,
            self.arithmetic,
            tuple(self.affines),
            self.absorbed,
            self.demands,
            regions,
            self._unquantized_reads(),
            self.weight_only,
            self.tables,
            self.recurrent,
            tuple(self.notes),
        )

    # -- who wants a grid ------------------------------------------------------------------

    def _collect_demands(self) -> None:
        integer = self.integer
        for node in self.nodes:
            op = self.ops[node]
            if op is None:
                if node.op == "call_module" and not is_batch_norm(node, self.modules):
                    self.notes.append(
                        Note(
                            node.name, "stays in float: not in the op table, or could not be traced"
                        )
                    )
                continue
            if op.kind is Kind.COMPUTE:
                self._demand_of_layer(node, op, integer)
            elif op.kind in (Kind.SUM, Kind.PRODUCT, Kind.AVERAGE):
                self._demand_of_arithmetic(node, op, integer)
            elif op.kind is Kind.BATCH_NORM:
                self._demand_of_batch_norm(node, integer)
            elif op.kind in (Kind.TRANSPARENT, Kind.JOINT, Kind.CLIP):
                if any(source in integer for source in node.all_input_nodes):
                    integer.add(node)
            elif op.kind is Kind.SMOOTH and not (
                self._is_table(node) or self._is_gated(node, op, integer)
            ):
                self._note_float(node, op)

    def _note_float(self, node: fx.Node, op: Op) -> None:
        said = f"{op.name} is computed in float between quantized tensors"
        if op.recurs and self.recipe.recurrent_weights == "8bit":
            stored = stored_matrices(node, self.ops, self.modules, self.recipe)
            if stored:
                self.recurrent[node] = stored
                said += f"; {len(stored)} of its weights are stored in INT8"
        self.notes.append(Note(node.name, said))

    def _is_gated(self, node: fx.Node, op: Op, integer: set[fx.Node]) -> bool:
        """A hard-swish or a SiLU of what is made in integers; a gate has no codes below zero."""
        value = node.args[0] if node.args else None
        if not op.gates_itself or not isinstance(value, fx.Node) or value not in integer:
            return False
        if TARGETS[self.recipe.target].signed or node in self.named_in_float:
            return False
        if self._gives_floats(value):
            return False
        self._demand(value, node, self._wide_bits)
        self.arithmetic[node] = Kind.PRODUCT
        integer.add(node)
        return True

    def _gives_floats(self, node: fx.Node) -> bool:
        """Whether a product of matrices makes it: the runtime gives those in float."""
        while True:
            op = self.ops[node]
            if op is None or op.kind not in (Kind.TRANSPARENT, Kind.CLIP, Kind.BATCH_NORM):
                return op is not None and op.kind is Kind.COMPUTE and not op.is_convolution
            node = node.all_input_nodes[0]

    def _is_table(self, node: fx.Node) -> bool:
        target = table_target(self.graph_module, node, self.ops)
        if target is None or self.recipe.embeddings == "float":
            return False
        self.tables[node] = target
        return True

    def _demand_of_layer(self, node: fx.Node, op: Op, integer: set[fx.Node]) -> None:
        settings = self.settings[node]
        reason = settings.float_reason or self._unsuitable(node, op)
        if reason:
            self.notes.append(Note(node.name, f"stays in float: {reason}"))
            return
        if settings.float_activations:
            if op.weight is None:
                self.float_products.add(node)
            else:
                self.weight_only[node] = settings
            self.notes.append(Note(node.name, f"reads its input in float: {settings.source}"))
            return
        self.layers[node] = settings
        for position in op.activations:
            self._demand(node.args[position], node, settings.activation_bits)  # type: ignore[arg-type]
        integer.add(node)

    def _unsuitable(self, node: fx.Node, op: Op) -> str | None:
        for position in op.activations:
            value = node.args[position]
            if not isinstance(value, fx.Node) or not is_float32_tensor(value):
                return "an input is not a floating-point tensor of the graph"
        if op.weight is None:
            return None
        weight = constant_of(self.graph_module, node.args[op.weight])
        if weight is None:
            return "its weight is computed from data, not a parameter"
        if op.is_convolution and len(shape_of(node) or ()) < weight.ndim:
            return "its input has no batch axis: add one with x[None]"
        bias = node.args[2]
        if bias is not None and constant_of(self.graph_module, bias) is None:
            return "its bias is computed from data, not a parameter"
        return None

    def _layer_in_front(self, node: fx.Node) -> fx.Node | None:
        """The layer that a BatchNorm can become part of."""
        if not is_batch_norm(node, self.modules) or self.calls[str(node.target)] > 1:
            return None
        layer = sole_compute_input(self.graph_module, node, self.reads)
        return layer if isinstance(layer, fx.Node) else None

    def _demand_of_batch_norm(self, node: fx.Node, integer: set[fx.Node]) -> None:
        if node in self.named_in_float:
            self.notes.append(Note(node.name, f"stays in float: {self.named_in_float[node]}"))
            return
        layer = self._layer_in_front(node)
        if layer in self.layers:
            self.absorbed[layer] = node
            integer.add(node)
            return
        if layer is not None:
            self.notes.append(Note(node.name, f"stays in float, as {layer.name} in front of it"))
            return
        value = node.args[0] if node.args else None
        axes = len(shape_of(node) or ()) - 2
        if not is_batch_norm(node, self.modules) or not isinstance(value, fx.Node):
            self.notes.append(Note(node.name, "stays in float: no running statistics"))
        elif not 1 <= axes <= 3:
            self.notes.append(Note(node.name, f"stays in float: an affine over {axes + 2} axes"))
        else:
            self._demand(value, node, self._wide_bits)
            self.affines[node] = None
            integer.add(node)

    @property
    def _wide_bits(self) -> int:
        """Bits of what is not the input of a layer: sums, products, averages, affines."""
        return max(self.recipe.residual_bits, self.recipe.activation_bits)

    def _tails(self) -> set[fx.Node]:
        """The last node, behind BatchNorm and clips, of integer convolutions, sums and products.

        The runtime has none of these with a float result, so they get a grid even where only a
        float operation reads them.
        """
        tails = set()
        for node in self.nodes:
            op = self.ops[node]
            convolves = op is not None and op.is_convolution and node in self.layers
            combines = self.arithmetic.get(node) in (Kind.SUM, Kind.PRODUCT)
            if convolves or combines or node in self.affines:
                tails.add(_tail(node, self.ops, self.absorbed))
        return tails

    def _demand_of_arithmetic(self, node: fx.Node, op: Op, integer: set[fx.Node]) -> None:
        if not is_float32_tensor(node):
            return
        values = [node.args[i] for i in op.activations if i < len(node.args)]
        tensors = [v for v in values if isinstance(v, fx.Node) and is_float32_tensor(v)]
        if len(tensors) < len(op.activations):
            self.notes.append(Note(node.name, f"stays in float: {op.name} with a plain number"))
            return
        if node in self.streams:
            self.notes.append(Note(node.name, f"stays in float: {REASON}"))
            return
        if node in self.named_in_float:
            self.notes.append(Note(node.name, f"stays in float: {self.named_in_float[node]}"))
            return
        if self._is_score(node):
            self.notes.append(Note(node.name, "stays in float: part of the scores of a softmax"))
            return
        if not any(v in integer for v in tensors):
            self.notes.append(
                Note(node.name, f"stays in float: no input of this {op.name} is made in integers")
            )
            return
        if op.kind is Kind.AVERAGE and not _is_spatial(node, op, self.modules):
            self.notes.append(Note(node.name, "stays in float: an average over other than space"))
            return
        for value in tensors:
            self._demand(value, node, self._wide_bits)
        self.arithmetic[node] = op.kind
        integer.add(node)

    def _is_score(self, node: fx.Node) -> bool:
        """True for a sum or product that only a softmax reads, as it is or summed further."""
        pending, seen = list(node.users), 0
        while pending:
            user = pending.pop()
            op = self.ops[user]
            seen += 1
            if op is None or seen > _LONGEST_SCORE:
                return False
            if op.reads_scores:
                continue
            if op.kind not in (Kind.SUM, Kind.PRODUCT, Kind.TRANSPARENT) and not op.masks:
                return False
            pending.extend(user.users)
        return bool(node.users)

    def _unquantized_reads(self) -> dict[fx.Node, frozenset[fx.Node]]:
        """Streams and layers with float activations read what was made in float as it is."""
        as_it_is = self.streams | self.weight_only.keys() | self.float_products
        made_in_float = (node for node in self.nodes if node not in self.integer)
        reads = ((node, as_it_is.intersection(node.users)) for node in made_in_float)
        return {node: frozenset(readers) for node, readers in reads if readers}

    def _demand(self, value: fx.Node, consumer: fx.Node, bits: int) -> None:
        wanted = self.demands.setdefault(value, {})
        wanted[consumer] = max(bits, wanted.get(consumer, 0))

    def _widen_what_float_layers_read(self) -> None:
        """A tensor that a float layer or submodule reads beside narrower layers has the bits of a sum, not theirs."""
        for node in self.nodes:
            op = self.ops[node]
            is_layer = op is not None and op.kind is Kind.COMPUTE and node not in self.layers
            if not is_layer and (op is not None or node.op != "call_module"):
                continue
            waiting = dict.fromkeys(node.all_input_nodes)
            while waiting:
                value, _ = waiting.popitem()
                if value not in self.demands and self._carries_grid(value):
                    waiting |= dict.fromkeys(_grid_inputs(value, self.ops[value]))  # type: ignore[arg-type]
                elif max(self.demands.get(value, {}).values(), default=8) < self._wide_bits:
                    self._demand(value, node, self._wide_bits)

    # -- which tensors share a grid --------------------------------------------------------

    def _carries_grid(self, node: fx.Node) -> bool:
        op = self.ops[node]
        if op is None or op.kind not in (Kind.TRANSPARENT, Kind.JOINT):
            return False
        return all(
            is_float32_tensor(source) or self._is_tuple_of_one_grid(source)
            for source in _grid_inputs(node, op)
        )

    def _is_tuple_of_one_grid(self, node: fx.Node) -> bool:
        op = self.ops[node]
        return op is not None and op.gives_parts

    def _regions(self) -> dict[fx.Node, Region]:
        """The region of every tensor on a grid, in the order in which regions are found."""
        connected: nx.Graph[fx.Node] = nx.Graph()
        carriers: set[fx.Node] = set()
        reached = set(self.demands)
        tails = self._tails()
        for node in reversed(self.nodes):
            if node not in reached:
                if node not in tails:
                    continue
                self._demand(node, next(iter(node.users)), self._wide_bits)
            connected.add_node(node)
            if self._carries_grid(node):
                op = self.ops[node]
                assert op is not None
                carriers.add(node)
                for source in _grid_inputs(node, op):
                    connected.add_edge(source, node)
                    reached.add(source)
        regions: dict[fx.Node, Region] = {}
        position = {node: i for i, node in enumerate(self.nodes)}
        for members in nx.connected_components(connected):
            widest = max(
                (bits for m in members for bits in self.demands.get(m, {}).values()), default=8
            )
            made = sorted((m for m in members if m not in carriers), key=position.__getitem__)
            regions |= dict.fromkeys(members, Region(tuple(made), widest))
        return regions


def _tail(
    node: fx.Node, ops: Mapping[fx.Node, Op | None], absorbed: Mapping[fx.Node, fx.Node]
) -> fx.Node:
    while len(node.users) == 1:
        user = next(iter(node.users))
        merged = ops.get(user)
        clips = merged is not None and merged.kind is Kind.CLIP
        if not clips and absorbed.get(node) is not user:
            break
        node = user
    return node


def _grid_inputs(node: fx.Node, op: Op) -> list[fx.Node]:
    """The arguments whose values the output holds."""
    first = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
    if op.kind is Kind.TRANSPARENT:
        return [first] if isinstance(first, fx.Node) else []
    inputs = first if isinstance(first, list | tuple) else node.args[:2]
    return [x for x in inputs if isinstance(x, fx.Node)]


def _is_spatial(node: fx.Node, op: Op, modules: dict[str, nn.Module]) -> bool:
    """True for pooling, and for a mean over all axes behind the channels."""
    if op.axes is not None:
        return True
    shape = shape_of(node.args[0]) or ()  # type: ignore[arg-type]
    axes: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if axes is None or len(shape) < 3:
        return False
    axes = [axes] if isinstance(axes, int) else list(axes)
    return sorted(a % len(shape) for a in axes) == list(range(2, len(shape)))
