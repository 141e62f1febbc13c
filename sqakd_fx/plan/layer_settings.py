"""What the recipe says of each layer: bits, family, granularity, or float with a reason."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import fx

from sqakd_fx.errors import RecipeError
from sqakd_fx.ir.meta import LayerSettings, module_path, own_name
from sqakd_fx.ir.op_table import Kind, Op
from sqakd_fx.ir.rewriting import paths_and_parents
from sqakd_fx.plan.projections import projections
from sqakd_fx.plan.recurrent import recurrent_overrides
from sqakd_fx.plan.weight_codes import is_depthwise
from sqakd_fx.recipe.keys import Override, Recipe


def layer_settings(
    graph_module: fx.GraphModule, recipe: Recipe, ops: Mapping[fx.Node, Op | None]
) -> dict[fx.Node, LayerSettings]:
    """Settings for every compute node of the graph.

    Raises:
        RecipeError: an override that matches nothing.
    """
    layers = [n for n, op in ops.items() if op is not None and op.kind is Kind.COMPUTE]
    apart = {
        node: (f"the {end} layer", "first_last", recipe.first_last)
        for node, end in _first_and_last(graph_module, layers).items()
    }
    for node in projections(graph_module, ops):
        what = "a projection of the residual stream"
        apart.setdefault(node, (what, "projections", recipe.projections))
    for node in layers:
        if is_depthwise(node, ops[node]):
            apart.setdefault(node, ("a depthwise layer", "depthwise", recipe.depthwise))
    without_weights = {name for node in _without_weights(ops) for name in _names(node)}
    used = {
        index
        for index, override in enumerate(recipe.override)
        if override.float and override.match in without_weights
    }
    used |= recurrent_overrides(ops, dict(graph_module.named_modules()), recipe)
    result: dict[fx.Node, LayerSettings] = {}
    for node in layers:
        op = ops[node]
        assert op is not None
        settings = _base(recipe, apart.get(node))
        for index, override in enumerate(recipe.override):
            if _matches(override, node, op):
                used.add(index)
                settings = _override(settings, override)
        result[node] = settings
    for index, override in enumerate(recipe.override):
        if index not in used:
            raise RecipeError(
                f"the override {override.match!r} matches no layer: "
                + _near_patterns(override.match, layers, ops)
            )
    return result


def named_in_float(recipe: Recipe, ops: Mapping[fx.Node, Op | None]) -> dict[fx.Node, str]:
    """Sums, products, averages and BatchNorms that an override leaves in float by name, and its source."""
    named = {override.match: override for override in recipe.override if override.float}
    return {
        node: _source(named[name])
        for node in _without_weights(ops)
        for name in _names(node)
        if name in named
    }


def _without_weights(ops: Mapping[fx.Node, Op | None]) -> list[fx.Node]:
    kinds = (Kind.SUM, Kind.PRODUCT, Kind.AVERAGE, Kind.BATCH_NORM)
    return [
        node for node, op in ops.items() if op is not None and (op.kind in kinds or op.gates_itself)
    ]


def _names(node: fx.Node) -> tuple[str, ...]:
    """Of a node without weights: its own, and that of the module that it calls."""
    return (node.name, str(node.target)) if node.op == "call_module" else (node.name,)


def _source(override: Override) -> str:
    source = f"override {override.match!r}"
    return f"{source}: {override.why}" if override.why else source


def _near_patterns(
    pattern: str, layers: Sequence[fx.Node], ops: Mapping[fx.Node, Op | None]
) -> str:
    paths = {module_path(node) or node.name for node in layers}
    kinds = {op.name for node in layers if (op := ops[node]) is not None}
    globs = {f"{path}.*" for path in paths_and_parents(paths) - paths}
    near = difflib.get_close_matches(pattern, sorted(paths | kinds | globs), n=3, cutoff=0.4)
    return f"did you mean {', '.join(near)}?" if near else "`sqakd-fx inspect` lists them"


def _base(recipe: Recipe, apart: tuple[str, str, str] | None) -> LayerSettings:
    """`apart`: what a layer is that the recipe sets apart, the recipe's key for it, and the value there."""
    weight, activation, reason = recipe.weight_bits, recipe.activation_bits, None
    source = f"recipe {recipe.name}"
    if apart is not None:
        what, key, value = apart
        if value == "8bit":
            weight = activation = 8
            source = f"{key}: {what} has 8 bits"
        elif value == "float":
            reason = f"the recipe keeps {what} in float ({key})"
    return LayerSettings(
        weight,
        activation,
        recipe.weight_family,
        recipe.activation_family,
        recipe.granularity,
        recipe.weight_range,
        reason,
        source,
    )


def _override(settings: LayerSettings, override: Override) -> LayerSettings:
    source = _source(override)
    reason = settings.float_reason
    float_activations = settings.float_activations
    if override.float is not None:
        float_activations = override.float == "activations"
        whole = override.float and not float_activations
        reason = f"the recipe's {source} says float" if whole else None
    return LayerSettings(
        override.weight_bits or settings.weight_bits,
        override.activation_bits or settings.activation_bits,
        override.weight_family or settings.weight_family,
        override.activation_family or settings.activation_family,
        override.granularity or settings.granularity,
        override.weight_range or settings.weight_range,
        reason,
        source,
        float_activations,
    )


def _matches(override: Override, node: fx.Node, op: Op) -> bool:
    if override.exact:
        return override.match == own_name(node)
    names = (module_path(node), node.name, op.name)
    return any(fnmatchcase(name, override.match) for name in names)


def _first_and_last(graph_module: fx.GraphModule, layers: list[fx.Node]) -> dict[fx.Node, str]:
    """Layers with no other layer before them ("first") or behind them ("last")."""
    is_layer = set(layers)
    nodes = list(graph_module.graph.nodes)
    behind: set[fx.Node] = set()
    ends: dict[fx.Node, str] = {}
    for node in nodes:
        if any(source in behind for source in node.all_input_nodes):
            behind.add(node)
        elif node in is_layer:
            ends[node] = "first"
        if node in is_layer:
            behind.add(node)
    before: set[fx.Node] = set()
    for node in reversed(nodes):
        if any(user in before for user in node.users):
            before.add(node)
        elif node in is_layer:
            ends.setdefault(node, "last")
        if node in is_layer:
            before.add(node)
    return ends
