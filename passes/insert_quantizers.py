"""Insert unified quantizer nodes, so that every input of a quantized operation is on a grid.

    Before:  y = relu(bn(conv(x, W)))                z = add(y, s)
    After:   xq = Qa(x);  Wq = Qw(W)                 yq = Q(relu(bn(conv(xq, Wq))))    z = add(yq, sq)

A quantizer stands behind the operation that makes a tensor and behind its fused BatchNorm and clip.
Operations that only move values carry their input's grid; tensors that meet in a concatenation
share one quantizer. A tensor that is wanted at several bit widths is quantized at the widest once,
and again, narrower, for those that want less. Quantizers are inserted disabled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import networkx as nx
from torch import fx, nn

from sqakd_fx.batch_norm import (
    AbsorbedBatchNorm,
    AffineBatchNorm,
    RoundedBias,
    is_batch_norm,
    sole_compute_input,
)
from sqakd_fx.compiler import Note, PassResult
from sqakd_fx.errors import PassError
from sqakd_fx.graphs import (
    constant_of,
    drop_unused,
    module_path,
    node_path,
    reads_of,
    set_attribute,
)
from sqakd_fx.ops import Kind, Op, is_float_tensor, op_of, shape_of
from sqakd_fx.placement import LayerSettings, layer_settings
from sqakd_fx.quantizer import Quantizer
from sqakd_fx.recipe import Recipe
from sqakd_fx.runtime_sum import RuntimeSum

_MASKS = ("masked_fill", "where", "to")
_LONGEST_SCORE = 16


@dataclass(frozen=True)
class InsertQuantizers:
    recipe: Recipe = field(default_factory=lambda: Recipe.model_validate({}))
    name: str = "insert_quantizers"

    def requires(self, graph_module: fx.GraphModule) -> None:
        for node in graph_module.graph.nodes:
            if node.op == "placeholder" and "tensor_meta" not in node.meta:
                raise PassError(f"input {node.name} has no recorded shape: trace the model first")
        if any(isinstance(m, Quantizer) for m in graph_module.modules()):
            raise PassError("the graph has quantizers already: insert them only once")

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        return _Insertion(graph_module, self.recipe).run()

    def ensures(self, result: PassResult) -> None:
        modules = dict(result.graph_module.named_modules())
        for node in result.graph_module.graph.nodes:
            op = op_of(node, modules)
            if op is None or op.weight is None or node.op != "call_function":
                continue
            weight = node.args[op.weight]
            quantized = isinstance(weight, fx.Node) and _is_quantizer(weight, modules)
            if quantized != ("layer" in node.meta):
                raise PassError(f"{node.name} is half quantized", node=node.name)


def _is_quantizer(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    return node.op == "call_module" and isinstance(modules.get(str(node.target)), Quantizer)


class _Insertion:
    """One run of the pass: demands are collected, regions formed, then nodes inserted."""

    def __init__(self, graph_module: fx.GraphModule, recipe: Recipe) -> None:
        self.graph_module = graph_module
        self.graph = graph_module.graph
        self.recipe = recipe
        self.modules = dict(graph_module.named_modules())
        self.nodes = list(self.graph.nodes)
        self.ops = {node: op_of(node, self.modules) for node in self.nodes}
        self.reads = reads_of(self.graph)
        self.calls = Counter(str(n.target) for n in self.nodes if n.op == "call_module")
        self.notes: list[Note] = []
        self.settings: dict[fx.Node, LayerSettings] = {}
        self.demands: dict[fx.Node, dict[fx.Node, int]] = {}
        self.absorbed: dict[fx.Node, fx.Node] = {}

    def run(self) -> PassResult:
        self.settings = layer_settings(self.graph_module, self.recipe, self.ops)
        self._collect_demands()
        sources, bits_of = self._regions()
        self._insert_activation_quantizers(sources, bits_of)
        self._insert_weight_quantizers()
        self._replace_affines()
        self._replace_sums()
        changed = self.graph.eliminate_dead_code() or bool(self.demands)
        drop_unused(self.graph_module)
        return PassResult(self.graph_module, changed, tuple(self.notes))

    # -- who wants a grid ------------------------------------------------------------------

    def _collect_demands(self) -> None:
        integer: set[fx.Node] = set()
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
            elif op.kind is Kind.SMOOTH:
                self.notes.append(
                    Note(node.name, f"{op.name} is computed in float between quantized tensors")
                )

    def _demand_of_layer(self, node: fx.Node, op: Op, integer: set[fx.Node]) -> None:
        settings = self.settings[node]
        reason = settings.float_reason or self._unsuitable(node, op)
        if reason:
            self.notes.append(Note(node.name, f"stays in float: {reason}"))
            return
        node.meta["layer"] = settings
        for position in op.activations:
            self._demand(node.args[position], node, settings.activation_bits)  # type: ignore[arg-type]
        integer.add(node)

    def _unsuitable(self, node: fx.Node, op: Op) -> str | None:
        for position in op.activations:
            value = node.args[position]
            if not isinstance(value, fx.Node) or not is_float_tensor(value):
                return "an input is not a floating-point tensor of the graph"
        if op.weight is None:
            return None
        if constant_of(self.graph_module, node.args[op.weight]) is None:
            return "its weight is computed from data, not a parameter"
        bias = node.args[2]
        if bias is not None and constant_of(self.graph_module, bias) is None:
            return "its bias is computed from data, not a parameter"
        return None

    def _absorbing_layer(self, node: fx.Node) -> fx.Node | None:
        """The quantized layer in front of a BatchNorm that it becomes part of."""
        if not is_batch_norm(node, self.modules):
            return None
        layer = sole_compute_input(self.graph_module, node, self.reads)
        once = self.calls[str(node.target)] == 1
        merges = isinstance(layer, fx.Node) and "layer" in layer.meta and once
        return layer if merges and isinstance(layer, fx.Node) else None

    def _demand_of_batch_norm(self, node: fx.Node, integer: set[fx.Node]) -> None:
        layer = self._absorbing_layer(node)
        if layer is not None:
            self.absorbed[layer] = node
            integer.add(node)
            return
        value = node.args[0] if node.args else None
        axes = len(shape_of(node) or ()) - 2
        if not is_batch_norm(node, self.modules) or not isinstance(value, fx.Node):
            self.notes.append(Note(node.name, "stays in float: no running statistics"))
        elif not 1 <= axes <= 3:
            self.notes.append(Note(node.name, f"stays in float: an affine over {axes + 2} axes"))
        else:
            self._demand(value, node, self._wide_bits)
            node.meta["affine"] = True
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
            convolves = op is not None and op.name.startswith("conv") and "layer" in node.meta
            combines = node.meta.get("arithmetic") in (Kind.SUM, Kind.PRODUCT)
            if not (convolves or combines or "affine" in node.meta):
                continue
            tails.add(self._tail(node))
        return tails

    def _tail(self, node: fx.Node) -> fx.Node:
        """The last node behind the BatchNorm that a layer absorbs and the clips that nobody else reads."""
        while len(node.users) == 1:
            user = next(iter(node.users))
            merged = self.ops.get(user)
            clips = merged is not None and merged.kind is Kind.CLIP
            if not clips and self.absorbed.get(node) is not user:
                break
            node = user
        return node

    def _demand_of_arithmetic(self, node: fx.Node, op: Op, integer: set[fx.Node]) -> None:
        if not is_float_tensor(node):
            return
        values = [node.args[i] for i in op.activations if i < len(node.args)]
        tensors = [v for v in values if isinstance(v, fx.Node) and is_float_tensor(v)]
        if len(tensors) < len(op.activations):
            self.notes.append(Note(node.name, f"stays in float: {op.name} with a plain number"))
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
        node.meta["arithmetic"] = op.kind
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
            if op.name == "softmax":
                continue
            if op.kind not in (Kind.SUM, Kind.PRODUCT, Kind.TRANSPARENT) and op.name not in _MASKS:
                return False
            pending.extend(user.users)
        return bool(node.users)

    def _demand(self, value: fx.Node, consumer: fx.Node, bits: int) -> None:
        wanted = self.demands.setdefault(value, {})
        wanted[consumer] = max(bits, wanted.get(consumer, 0))

    # -- which tensors share a grid --------------------------------------------------------

    def _carries_grid(self, node: fx.Node) -> bool:
        op = self.ops[node]
        if op is None or op.kind not in (Kind.TRANSPARENT, Kind.JOINT):
            return False
        return all(
            is_float_tensor(source) or self._is_tuple_of_one_grid(source)
            for source in _grid_inputs(node, op)
        )

    def _is_tuple_of_one_grid(self, node: fx.Node) -> bool:
        op = self.ops[node]
        return op is not None and op.name in ("chunk", "split", "unbind", "split_with_sizes")

    def _regions(self) -> tuple[dict[int, list[fx.Node]], dict[fx.Node, tuple[int, int]]]:
        """Sources by region number, and for every tensor on a grid its (region, bits)."""
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
        sources: dict[int, list[fx.Node]] = {}
        bits_of: dict[fx.Node, tuple[int, int]] = {}
        position = {node: i for i, node in enumerate(self.nodes)}
        for number, members in enumerate(nx.connected_components(connected)):
            widest = max(
                (bits for m in members for bits in self.demands.get(m, {}).values()), default=8
            )
            for member in members:
                bits_of[member] = (number, widest)
            roots = [m for m in members if m not in carriers]
            sources[number] = sorted(roots, key=position.__getitem__)
        return sources, bits_of

    # -- insertion -------------------------------------------------------------------------

    def _insert_activation_quantizers(
        self, sources: dict[int, list[fx.Node]], bits_of: dict[fx.Node, tuple[int, int]]
    ) -> None:
        quantizer_of: dict[int, tuple[str, Quantizer]] = {}
        for number, roots in sources.items():
            bits = bits_of[roots[0]][1]
            name, quantizer = self._new_activation_quantizer(roots[0], bits, "output_quantizer")
            if bits == 8 and all(root.op == "placeholder" for root in roots):
                # Its gradient would cost the first layer's backward to the input: 6 % of a ResNet-18 step.
                quantizer.requires_grad_(False)
            quantizer_of[number] = (name, quantizer)
            for root in roots:
                self._insert_behind(root, name, dict(root.users))
        for value, wanted in self.demands.items():
            number, widest = bits_of[value]
            _, quantizer = quantizer_of[number]
            by_bits: dict[int, list[fx.Node]] = {}
            for consumer, bits in wanted.items():
                by_bits.setdefault(bits, []).append(consumer)
                consumer.meta.setdefault("input_quantizers", {})
            for bits, consumers in by_bits.items():
                chosen = quantizer
                if bits < widest:
                    name, chosen = self._new_activation_quantizer(
                        value, bits, f"quantizer_{bits}bit"
                    )
                    on_grid = self._quantized(value)
                    self._insert_behind(on_grid, name, dict.fromkeys(consumers))
                for consumer in consumers:
                    consumer.meta["input_quantizers"][value.name] = chosen

    def _quantized(self, value: fx.Node) -> fx.Node:
        for user in value.users:
            if _is_quantizer(user, self.modules):
                return user
        return value

    def _insert_behind(self, value: fx.Node, name: str, users: Iterable[fx.Node]) -> fx.Node:
        with self.graph.inserting_after(value):
            node = self.graph.call_module(name, (value,))
        node.meta["tensor_meta"] = value.meta.get("tensor_meta")
        node.meta["module_path"] = module_path(value)
        for user in users:
            if user is not node:
                user.replace_input_with(value, node)
        return node

    def _new_activation_quantizer(
        self, value: fx.Node, bits: int, what: str
    ) -> tuple[str, Quantizer]:
        settings = [self.settings[c] for c in self.demands.get(value, {}) if c in self.settings]
        family = settings[0].activation_family if settings else self.recipe.activation_family
        quantizer = Quantizer(
            family,
            "activation",
            bits,
            power_of_two=self.recipe.power_of_two,
            delta=self.recipe.delta,
            mu=self.recipe.mu,
        )
        wanted = (
            f"{value.target}_{what}"  # never inside the module or tensor that it follows
            if value.op in ("call_module", "get_attr")
            else f"{node_path(value)}.{what}"
        )
        name = set_attribute(self.graph_module, wanted, quantizer)
        self.modules[name] = quantizer
        return name, quantizer

    def _insert_weight_quantizers(self) -> None:
        tied: dict[str, tuple[str, Quantizer]] = {}
        for node in self.nodes:
            settings: LayerSettings | None = node.meta.get("layer")
            op = self.ops.get(node)
            if settings is None or op is None or op.weight is None:
                continue
            weight = node.args[op.weight]
            assert isinstance(weight, fx.Node)
            target = str(weight.target)
            if target not in tied:
                quantizer = self._weight_quantizer(weight, node, op, settings)
                name = set_attribute(self.graph_module, f"{target}_quantizer", quantizer)
                self.modules[name] = quantizer
                tied[target] = (name, quantizer)
            name, quantizer = tied[target]
            with self.graph.inserting_before(node):
                quantized = self.graph.call_module(name, (weight,))
            quantized.meta = dict(weight.meta)
            node.update_arg(op.weight, quantized)
            self._round_bias(node, weight, quantizer)

    def _replace_affines(self) -> None:
        for node in self.nodes:
            if "affine" in node.meta:
                (x_quantizer,) = node.meta["input_quantizers"].values()
                node.target = set_attribute(
                    self.graph_module,
                    f"{node.target}_affine",
                    AffineBatchNorm(self.modules[str(node.target)], x_quantizer),
                )

    def _replace_sums(self) -> None:
        """Sums that one quantizer waits for, behind clips or none, round as the runtime does in evaluation."""
        for node in self.nodes:
            op = self.ops[node]
            if node.meta.get("arithmetic") is not Kind.SUM or op is None or op.name != "add":
                continue
            out = self._sole_quantizer(node)
            if out is None:
                continue
            a, b = (
                node.meta["input_quantizers"][self._before_quantizers(node.args[i]).name]  # type: ignore[arg-type]
                for i in op.activations
            )
            node.target = set_attribute(
                self.graph_module, f"{node_path(node)}.rounding", RuntimeSum(a, b, out)
            )
            node.op = "call_module"

    def _sole_quantizer(self, node: fx.Node) -> Quantizer | None:
        """What quantizes a value that nobody else reads, behind its clips."""
        users = list(self._tail(node).users)
        if len(users) != 1 or not _is_quantizer(users[0], self.modules):
            return None
        return cast(Quantizer, self.modules[str(users[0].target)])

    def _before_quantizers(self, node: fx.Node) -> fx.Node:
        while _is_quantizer(node, self.modules):
            node = node.all_input_nodes[0]
        return node

    def _weight_quantizer(
        self, weight: fx.Node, node: fx.Node, op: Op, settings: LayerSettings
    ) -> Quantizer:
        shape = shape_of(weight) or ()
        grouped_transpose = op.channel_axis == 1 and node.args[6] != 1
        per_channel = settings.granularity == "channel" and not grouped_transpose
        return Quantizer(
            settings.weight_family,
            "weight",
            settings.weight_bits,
            channels=shape[op.channel_axis] if per_channel else None,
            axis=op.channel_axis if per_channel else None,
            zero_in_grid=self.recipe.zero_in_grid,
            power_of_two=self.recipe.power_of_two,
            delta=self.recipe.delta,
            mu=self.recipe.mu,
        )

    def _round_bias(self, node: fx.Node, weight: fx.Node, quantizer: Quantizer) -> None:
        """The int32 bias: behind an absorbed BatchNorm where there is one, else the layer's own."""
        x_quantizer = next(iter(node.meta["input_quantizers"].values()))
        bias = node.args[2]
        batch_norm = self.absorbed.get(node)
        if batch_norm is not None:
            name = set_attribute(
                self.graph_module,
                f"{batch_norm.target}_absorbed",
                AbsorbedBatchNorm(self.modules[str(batch_norm.target)], x_quantizer, quantizer),
            )
            batch_norm.target = name
            batch_norm.args = (node, weight) if bias is None else (node, weight, bias)
            return
        if bias is not None:
            stem = str(bias.target)  # type: ignore[union-attr]
            name = set_attribute(
                self.graph_module, f"{stem}_rounding", RoundedBias(x_quantizer, quantizer)
            )
            with self.graph.inserting_before(node):
                rounded = self.graph.call_module(name, (bias, weight))
            rounded.meta = dict(bias.meta)  # type: ignore[union-attr]
            node.update_arg(2, rounded)


def _grid_inputs(node: fx.Node, op: Op) -> list[fx.Node]:
    """The arguments whose values the output holds."""
    first = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
    if op.kind is Kind.TRANSPARENT:
        return [first] if isinstance(first, fx.Node) else []
    inputs = first if isinstance(first, list | tuple) else node.args[:2]
    return [x for x in inputs if isinstance(x, fx.Node)]


def _is_spatial(node: fx.Node, op: Op, modules: dict[str, nn.Module]) -> bool:
    """True for pooling, and for a mean over all axes behind the channels."""
    if op.name != "mean":
        return True
    shape = shape_of(node.args[0]) or ()  # type: ignore[arg-type]
    axes: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if axes is None or len(shape) < 3:
        return False
    axes = [axes] if isinstance(axes, int) else list(axes)
    return sorted(a % len(shape) for a in axes) == list(range(2, len(shape)))
