"""Insert unified quantizer nodes, so that every input of a quantized operation is on a grid.

    Before:  y = relu(bn(conv(x, W)))                z = add(y, s)
    After:   xq = Qa(x);  Wq = Qw(W)                 yq = Q(relu(bn(conv(xq, Wq))))    z = add(yq, sq)

A quantizer stands behind the operation that makes a tensor and behind its fused BatchNorm and clip.
Operations that only move values carry their input's grid; tensors that meet in a concatenation
share one quantizer. A tensor that is wanted at several bit widths is quantized at the widest once,
and again, narrower, for those that want less: with `activation_affine="channel"` behind a shift and a scale of
each channel, which begin as none. Quantizers are inserted disabled.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import cast

from torch import fx, nn
from torch.nn import functional as F

from sqakd_fx.errors import PassError
from sqakd_fx.ir import meta
from sqakd_fx.ir.op_table import Kind, op_of, shape_of
from sqakd_fx.ir.pass_manager import Pass, PassResult
from sqakd_fx.ir.recurrent_layers import as_function
from sqakd_fx.ir.rewriting import drop_unused, get_attribute, node_path, set_attribute
from sqakd_fx.plan.quantizer_plan import Region, plan_quantizers
from sqakd_fx.plan.recurrent import weight_matrices
from sqakd_fx.plan.tables import looked_up
from sqakd_fx.plan.weight_codes import ALL_CODES, WeightCodes, weight_codes
from sqakd_fx.quant.batch_norm import AbsorbedBatchNorm, AffineBatchNorm, ChannelAffine, RoundedBias
from sqakd_fx.quant.gated import GATED
from sqakd_fx.quant.quantizer import Quantizer
from sqakd_fx.quant.runtime_sum import KERNEL, RuntimeSum
from sqakd_fx.recipe.keys import Recipe
from sqakd_fx.targets import TARGETS


@dataclass(frozen=True)
class InsertQuantizers(Pass):
    """Insert disabled quantizers where the recipe wants them, so that inputs of quantized operations are on a grid."""

    recipe: Recipe = field(default_factory=lambda: Recipe.model_validate({}))
    name = "insert_quantizers"

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
            marked = meta.layer(node) is not None or meta.weight_only(node) is not None
            if quantized != marked:
                raise PassError(f"{node.name} is half quantized", node=node.name)


def _is_quantizer(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    return node.op == "call_module" and isinstance(modules.get(str(node.target)), Quantizer)


class _Insertion:
    """One run of the pass: what the plan says is done, node by node."""

    def __init__(self, graph_module: fx.GraphModule, recipe: Recipe) -> None:
        self.graph_module = graph_module
        self.graph = graph_module.graph
        self.recipe = recipe
        self.modules = dict(graph_module.named_modules())
        self.plan = plan_quantizers(graph_module, recipe)
        self.of_weight: dict[int, tuple[str, Quantizer]] = {}
        """By the identity of a weight, its quantizer."""

    def run(self) -> PassResult:
        self._mark_nodes()
        self._insert_activation_quantizers()
        self._insert_weight_quantizers()
        self._insert_table_quantizers()
        self._insert_recurrent_quantizers()
        self._replace_affines()
        self._replace_sums()
        self._replace_gates()
        plan = self.plan
        inserted = plan.demands or plan.weight_only or plan.tables or plan.recurrent
        changed = self.graph.eliminate_dead_code() or bool(inserted)
        drop_unused(self.graph_module)
        return PassResult(self.graph_module, changed, self.plan.notes)

    def _mark_nodes(self) -> None:
        """For the passes behind: which nodes become integer, and how."""
        for node, settings in self.plan.layers.items():
            meta.set_layer(node, settings)
        for node, settings in self.plan.weight_only.items():
            meta.set_weight_only(node, settings)
        for node, kind in self.plan.arithmetic.items():
            meta.set_arithmetic(node, kind)
        for node in self.plan.affines:
            meta.set_affine(node)

    def _insert_activation_quantizers(self) -> None:
        plan = self.plan
        quantizer_of: dict[Region, Quantizer] = {}
        for region in dict.fromkeys(plan.regions.values()):
            name, quantizer = self._new_activation_quantizer(
                region.sources[0], region.bits, "output_quantizer"
            )
            if region.bits == 8 and all(source.op == "placeholder" for source in region.sources):
                # Its gradient would cost the first layer's backward to the input: 6 % of a ResNet-18 step.
                quantizer.requires_grad_(False)
            quantizer_of[region] = quantizer
            for source in region.sources:
                as_it_is = plan.unquantized_reads.get(source, ())
                self._insert_behind(source, name, [u for u in source.users if u not in as_it_is])
        for value, wanted in plan.demands.items():
            region = plan.regions[value]
            quantizer = quantizer_of[region]
            alike: dict[tuple[int, bool], list[fx.Node]] = {}
            for consumer, bits in wanted.items():
                shifts = bits < region.bits and self._has_affine(consumer)
                alike.setdefault((bits, shifts), []).append(consumer)
            for (bits, shifts), consumers in alike.items():
                chosen = quantizer
                if bits < region.bits:
                    name, chosen = self._new_activation_quantizer(
                        value, bits, f"quantizer_{bits}bit"
                    )
                    read = self._quantized(value)
                    if shifts:
                        read = self._insert_affine(value, read, quantizer, consumers)
                    narrow = self._insert_behind(read, name, consumers)
                    meta.set_module_path(narrow, meta.module_path(value))
                for consumer in consumers:
                    meta.set_input_quantizer(consumer, value.name, chosen)

    def _has_affine(self, consumer: fx.Node) -> bool:
        """Whether a layer's narrow activations get an affine of each channel: axis 1, as a convolution has them."""
        op = self.plan.ops[consumer]
        convolves = op is not None and op.is_convolution
        return self.recipe.activation_affine == "channel" and convolves

    def _insert_affine(
        self, value: fx.Node, on_grid: fx.Node, quantizer: Quantizer, users: Iterable[fx.Node]
    ) -> fx.Node:
        """A shift and a scale of each channel of `on_grid`, which holds `value` on the grid of `quantizer`."""
        channels = (shape_of(value) or ())[1]
        affine = AffineBatchNorm(ChannelAffine(channels), quantizer)
        name = set_attribute(self.graph_module, f"{node_path(value)}_affine", affine)
        self.modules[name] = affine
        node = self._insert_behind(on_grid, name, users)
        meta.set_module_path(node, name)
        meta.set_affine(node)
        return node

    def _quantized(self, value: fx.Node) -> fx.Node:
        for user in value.users:
            if _is_quantizer(user, self.modules):
                return user
        return value

    def _insert_behind(self, value: fx.Node, name: str, users: Iterable[fx.Node]) -> fx.Node:
        with self.graph.inserting_after(value):
            node = self.graph.call_module(name, (value,))
        node.meta["tensor_meta"] = value.meta.get("tensor_meta")
        meta.set_module_path(node, meta.module_path(value))
        for user in users:
            if user is not node:
                user.replace_input_with(value, node)
        return node

    def _new_activation_quantizer(
        self, value: fx.Node, bits: int, what: str
    ) -> tuple[str, Quantizer]:
        layers = [c for c in self.plan.demands.get(value, {}) if c in self.plan.layers]
        family = (self.plan.layers[layers[0]] if layers else self.recipe).activation_family
        quantizer = Quantizer(
            family,
            "activation",
            bits,
            signed=TARGETS[self.recipe.target].signed,
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

    def _insert_table_quantizers(self) -> None:
        """A table has 8 bits and a scale for each row; one that a layer reads as well has the layer's quantizer."""
        for node, target in self.plan.tables.items():
            name = self._row_quantizer(target, "table_quantizer")
            with self.graph.inserting_before(node):
                weight = self.graph.get_attr(target)
                meta.set_module_path(weight, target.rpartition(".")[0])
                rows = self.graph.call_module(name, (weight,))
                rows.meta = dict(weight.meta)
                found = self.graph.call_function(F.embedding, (looked_up(node), rows))
            found.meta = dict(node.meta)
            meta.set_module_path(found, node_path(node))
            meta.set_table(found)
            name = node.name
            node.replace_all_uses_with(found)
            self.graph.erase_node(node)
            found.name = name

    def _insert_recurrent_quantizers(self) -> None:
        """Weights of recurrent layers have 8 bits and a scale for each row; the layers compute in float."""
        for planned, stored in self.plan.recurrent.items():
            node = planned
            if node.op == "call_module":
                node = as_function(self.graph_module, node)
            meta.set_recurrent(node)
            for weight in weight_matrices(node):
                target = str(weight.target)
                if target not in stored:
                    continue
                name = self._row_quantizer(target, "quantizer")
                with self.graph.inserting_before(node):
                    quantized = self.graph.call_module(name, (weight,))
                quantized.meta = dict(weight.meta)
                node.replace_input_with(weight, quantized)

    def _row_quantizer(self, target: str, what: str) -> str:
        """The name of a quantizer of 8 bits and a scale for each row: that of the same matrix, or a new one.

        Its scales stay as calibrated: a batch reads few rows of a table, and 8 bits lose nothing.
        """
        matrix = get_attribute(self.graph_module, target)
        name, quantizer = self.of_weight.get(id(matrix), ("", None))
        if quantizer is not None and (quantizer.bits, quantizer.axis) == (8, 0):
            return name
        made = Quantizer(
            "minmax",
            "weight",
            8,
            channels=len(matrix),
            axis=0,
            power_of_two=self.recipe.power_of_two,
        ).requires_grad_(False)
        name = set_attribute(self.graph_module, f"{target}_{what}", made)
        self.modules[name] = made
        self.of_weight[id(matrix)] = (name, made)
        return name

    def _insert_weight_quantizers(self) -> None:
        tied: dict[str, tuple[str, Quantizer]] = {}
        fitting = self._fitting_codes()
        for node, settings in {**self.plan.layers, **self.plan.weight_only}.items():
            op = self.plan.ops[node]
            if op is None or op.weight is None:
                continue
            weight = node.args[op.weight]
            assert isinstance(weight, fx.Node)
            target = str(weight.target)
            if target not in tied:
                quantizer = self._weight_quantizer(weight, node, settings, fitting[target])
                name = set_attribute(self.graph_module, f"{target}_quantizer", quantizer)
                self.modules[name] = quantizer
                tied[target] = (name, quantizer)
                read = get_attribute(self.graph_module, target)
                self.of_weight.setdefault(id(read), (name, quantizer))
            name, quantizer = tied[target]
            with self.graph.inserting_before(node):
                quantized = self.graph.call_module(name, (weight,))
            quantized.meta = dict(weight.meta)
            node.update_arg(op.weight, quantized)
            if node in self.plan.layers:
                self._round_bias(node, weight, quantizer)

    def _fitting_codes(self) -> dict[str, WeightCodes]:
        """The codes of each weight, by name, that fit with the activations of every layer that reads it.

        Where all of them are in float, all of INT8 fits.
        """
        found: dict[str, WeightCodes] = {}
        for node, settings in {**self.plan.layers, **self.plan.weight_only}.items():
            op = self.plan.ops[node]
            if op is None or op.weight is None:
                continue
            target = str(cast(fx.Node, node.args[op.weight]).target)
            in_float = node in self.plan.weight_only
            fits = ALL_CODES if in_float else weight_codes(node, op, settings)
            found[target] = fits.with_those_of(found.get(target, fits))
        return found

    def _replace_affines(self) -> None:
        for node in self.plan.affines:
            (x_quantizer,) = meta.input_quantizers(node, Quantizer).values()
            node.target = set_attribute(
                self.graph_module,
                f"{node.target}_affine",
                AffineBatchNorm(self.modules[str(node.target)], x_quantizer),
            )

    def _replace_sums(self) -> None:
        """Sums that one quantizer waits for, behind clips or none, round as the runtime does in evaluation."""
        for node, kind in self.plan.arithmetic.items():
            op = self.plan.ops[node]
            if kind is not Kind.SUM or op is None or op.fused != KERNEL:
                continue
            out = self._sole_quantizer(node)
            if out is None:
                continue
            known = meta.input_quantizers(node, Quantizer)
            a, b = (
                known[self._before_quantizers(node.args[i]).name]  # type: ignore[arg-type]
                for i in op.activations
            )
            node.target = set_attribute(
                self.graph_module, f"{node_path(node)}.rounding", RuntimeSum(a, b, out)
            )
            node.op = "call_module"

    def _replace_gates(self) -> None:
        """Hard-swishes and SiLUs of codes have a gate on codes."""
        for node in self.plan.arithmetic:
            op = self.plan.ops[node]
            if op is None or not op.gates_itself:
                continue
            (x,) = meta.input_quantizers(node, Quantizer).values()
            node.target = set_attribute(
                self.graph_module, f"{node_path(node)}_gated", GATED[op.name](x)
            )
            node.op, node.args, node.kwargs = "call_module", node.args[:1], {}

    def _sole_quantizer(self, node: fx.Node) -> Quantizer | None:
        """What quantizes a value that nobody else reads, behind its clips."""
        users = list(self.plan.tail(node).users)
        if len(users) != 1 or not _is_quantizer(users[0], self.modules):
            return None
        return cast(Quantizer, self.modules[str(users[0].target)])

    def _before_quantizers(self, node: fx.Node) -> fx.Node:
        while _is_quantizer(node, self.modules):
            node = node.all_input_nodes[0]
        return node

    def _weight_quantizer(
        self, weight: fx.Node, node: fx.Node, settings: meta.LayerSettings, codes: WeightCodes
    ) -> Quantizer:
        op = self.plan.ops[node]
        assert op is not None
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
            largest_code=codes.largest,
            paired=codes.paired,
            power_of_two=self.recipe.power_of_two,
            delta=self.recipe.delta,
            mu=self.recipe.mu,
        )

    def _round_bias(self, node: fx.Node, weight: fx.Node, quantizer: Quantizer) -> None:
        """The int32 bias: behind an absorbed BatchNorm where there is one, else the layer's own."""
        x_quantizer = next(iter(meta.input_quantizers(node, Quantizer).values()))
        bias = node.args[2]
        batch_norm = self.plan.absorbed.get(node)
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
