"""Give every operation that quantization cares about one form.

    Before:  y = self.conv(x)                       y = x.add_(z)          y = aten.addmm(b, x, wT)
    After:   y = F.conv2d(x, conv_weight, ...)      y = torch.add(x, z)    y = F.linear(x, w, b)

Convolutions, linear layers, matrix products, sums, products and clips become calls of the op
table's target with all arguments in order; parameters become get_attr nodes. Attention and einsum
become matrix products. What was changed in place is read behind the change. What is the identity in
evaluation (dropout) disappears: the student is trained to match a teacher that has none.
"""

from __future__ import annotations

import itertools
import math
import operator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn import functional as F

from sqakd_fx.compiler import Note, PassResult
from sqakd_fx.graphs import attribute_name, drop_unused, get_attribute, insert_attribute
from sqakd_fx.ops import TABLE, Kind, Op, bind, op_name, shape_of


@dataclass(frozen=True)
class Canonicalize:
    name: str = "canonicalize"

    def requires(self, graph_module: fx.GraphModule) -> None:
        pass

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        modules = dict(graph_module.named_modules())
        notes: list[Note] = []
        changed = _read_behind_changes_in_place(graph_module.graph, modules)
        for node in list(graph_module.graph.nodes):
            name = op_name(node, modules)
            op = TABLE.get(name) if name else None
            rewritten = _rewrite(graph_module, node, name, op, modules, notes)
            changed = changed or rewritten
        graph_module.graph.eliminate_dead_code()
        drop_unused(graph_module)
        graph_module.recompile()
        return PassResult(graph_module, changed, tuple(notes))

    def ensures(self, result: PassResult) -> None:
        pass


def _rewrite(
    graph_module: fx.GraphModule,
    node: fx.Node,
    name: str | None,
    op: Op | None,
    modules: dict[str, nn.Module],
    notes: list[Note],
) -> bool:
    special = _SPECIAL.get(name or "")
    if special is not None and node.op in ("call_function", "call_method"):
        return special(graph_module, node)
    if op is None:
        return False
    if op.kind is Kind.NOISE:
        if node.op == "call_module" or _is_off(node):
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph_module.graph.erase_node(node)
            return True
        return False
    if op.target is None or op.kind not in (Kind.COMPUTE, Kind.SUM, Kind.PRODUCT, Kind.CLIP):
        return False
    try:
        arguments = (
            _module_arguments(graph_module, node, op, modules[str(node.target)])
            if node.op == "call_module"
            else _function_arguments(node, op)
        )
    except TypeError as error:
        notes.append(Note(node.name, f"stays in float: {error}"))
        return False
    if arguments is None:
        return False
    if op.kind is Kind.COMPUTE and op.name.startswith("conv"):
        _spell_out_padding(graph_module, node, op, arguments)
    with graph_module.graph.inserting_before(node):
        new = graph_module.graph.call_function(op.target, tuple(arguments.values()))
    new.meta = dict(node.meta)
    if node.op == "call_module":
        new.meta["module_path"] = str(node.target)
        new.meta["is_module"] = True
    name = node.name
    node.replace_all_uses_with(new)
    graph_module.graph.erase_node(node)
    new.name = name
    return True


def _function_arguments(node: fx.Node, op: Op) -> dict[str, Any] | None:
    kwargs = dict(node.kwargs)
    if op.kind is Kind.SUM and kwargs.pop("alpha", 1) != 1:
        return None
    kwargs.pop("out", None)
    arguments = bind(op, node.args, kwargs)
    if op.kind not in (Kind.SUM, Kind.PRODUCT):
        return arguments
    if shape_of(node) is None:
        return None
    if not isinstance(arguments["input"], fx.Node):
        if op.name == "sub":
            return None
        arguments = {"input": arguments["other"], "other": arguments["input"]}
    return arguments


def _module_arguments(
    graph_module: fx.GraphModule, node: fx.Node, op: Op, module: nn.Module
) -> dict[str, Any]:
    given: dict[str, Any] = {"input": node.args[0] if node.args else node.kwargs["input"]}
    for argument in op.arguments[1:]:
        value = getattr(module, argument, None)
        if isinstance(value, nn.Parameter):
            with graph_module.graph.inserting_before(node):
                value = graph_module.graph.get_attr(f"{node.target}.{argument}")
            tensor = getattr(module, argument)
            value.meta["tensor_meta"] = _meta(tensor)
            value.meta["module_path"] = str(node.target)
        given[argument] = value
    if op.name == "clamp":
        return bind(op, (), given)
    if getattr(module, "padding_mode", "zeros") != "zeros":
        amounts = [int(x) for x in module._reversed_padding_repeated_twice]  # type: ignore[union-attr]
        with graph_module.graph.inserting_before(node):
            padded = graph_module.graph.call_function(
                F.pad, (given["input"], amounts), {"mode": module.padding_mode}
            )
        padded.meta["module_path"] = str(node.target)
        given["input"], given["padding"] = padded, 0
    return bind(op, (), given)


def _spell_out_padding(
    graph_module: fx.GraphModule, node: fx.Node, op: Op, arguments: dict[str, Any]
) -> None:
    """'same' and 'valid' become numbers, and every per-axis setting a tuple."""
    axes = int(op.name[-2])
    for key in ("stride", "dilation", "padding", "output_padding"):
        value = arguments.get(key)
        if isinstance(value, int):
            arguments[key] = (value,) * axes
        elif isinstance(value, list | tuple):
            arguments[key] = tuple(value) * (axes if len(value) == 1 else 1)
    padding = arguments["padding"]
    if padding == "valid":
        arguments["padding"] = (0,) * axes
    if padding != "same":
        return
    kernel = shape_of(arguments["weight"]) or ()
    totals = [d * (k - 1) for d, k in zip(arguments["dilation"], kernel[2:], strict=True)]
    arguments["padding"] = tuple(total // 2 for total in totals)
    if any(total % 2 for total in totals):
        extra = [side for total in reversed(totals) for side in (0, total % 2)]
        with graph_module.graph.inserting_before(node):
            arguments["input"] = graph_module.graph.call_function(
                F.pad, (arguments["input"], extra)
            )


def _meta(tensor: torch.Tensor) -> Any:
    return torch.fx.passes.shape_prop._extract_tensor_metadata(tensor)


def _is_off(node: fx.Node) -> bool:
    training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else None)
    return training is False


def _replace(
    graph_module: fx.GraphModule, node: fx.Node, target: Any, args: tuple[Any, ...]
) -> bool:
    with graph_module.graph.inserting_before(node):
        new = graph_module.graph.call_function(target, args)
    new.meta = dict(node.meta)
    name = node.name
    node.replace_all_uses_with(new)
    graph_module.graph.erase_node(node)
    new.name = name
    return True


def _transposed_weight(graph_module: fx.GraphModule, node: Any) -> fx.Node | None:
    """The (out, in) weight whose transpose `node` is, made where it is a constant."""
    if not isinstance(node, fx.Node):
        return None
    source = node
    if node.op == "call_function" or node.op == "call_method":
        called = op_name(node, {})
        if called in ("t", "transpose", "permute", "numpy_T") and isinstance(node.args[0], fx.Node):
            inner = node.args[0]
            shape = shape_of(inner)
            swapped = shape is not None and shape_of(node) == shape[::-1] and len(shape) == 2
            if inner.op == "get_attr" and swapped:
                return inner
        return None
    if source.op != "get_attr":
        return None
    weight = get_attribute(graph_module, str(source.target))
    if weight.ndim != 2:
        return None
    return insert_attribute(
        graph_module,
        source,
        f"{source.target}_transposed",
        nn.Parameter(weight.detach().t().contiguous()),
    )


def _read_behind_changes_in_place(graph: fx.Graph, modules: dict[str, nn.Module]) -> bool:
    """Whoever reads a tensor after it was changed in place reads the change's result instead."""
    position = {node: i for i, node in enumerate(graph.nodes)}
    changed = False
    for node in graph.nodes:
        if not _is_in_place(node, modules) or not node.all_input_nodes:
            continue
        source = node.all_input_nodes[0]
        for user in list(source.users):
            if position[user] > position[node]:
                user.replace_input_with(source, node)
                changed = True
    return changed


def _is_in_place(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    if node.kwargs.get("inplace"):
        return True
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    name = str(getattr(node.target, "__name__", ""))
    if getattr(node.target, "__module__", "") == "_operator":
        return name in ("iadd", "isub", "imul", "itruediv", "imatmul")
    return name.endswith("_") and not name.endswith("__")


def _call(
    graph_module: fx.GraphModule, like: fx.Node, target: Any, *args: Any, **kwargs: Any
) -> fx.Node:
    """A new node that stands for a part of what `like` computes."""
    new = graph_module.graph.call_function(target, args, kwargs)
    new.meta = {key: like.meta[key] for key in ("module_path", "stack_trace") if key in like.meta}
    return new


def _attention(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """softmax(q kᵀ scale + mask) v, with matrix products that can be quantized."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    query, key, value = (given[name] for name in names[:3])
    q_shape, k_shape = shape_of(query), shape_of(key)
    if q_shape is None or k_shape is None:
        return False
    scale = given.get("scale")
    scale = 1 / math.sqrt(q_shape[-1]) if scale is None else scale
    with graph_module.graph.inserting_before(node):

        def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
            return _call(graph_module, node, target, *args, **kwargs)

        if given.get("enable_gqa") and q_shape[-3] != k_shape[-3]:
            repeats = q_shape[-3] // k_shape[-3]
            key = call(torch.repeat_interleave, key, repeats, dim=-3)
            value = call(torch.repeat_interleave, value, repeats, dim=-3)
        scores = call(torch.matmul, query, call(torch.transpose, key, -2, -1))
        scores = call(torch.mul, scores, scale)
        mask = given.get("attn_mask")
        if given.get("is_causal"):
            blocked = torch.ones(q_shape[-2], k_shape[-2], dtype=torch.bool).triu(1)
            constant = insert_attribute(graph_module, node, f"{node.name}_causal_mask", blocked)
            scores = call(torch.masked_fill, scores, constant, float("-inf"))
        if isinstance(mask, fx.Node):
            meta = mask.meta.get("tensor_meta")
            if getattr(meta, "dtype", None) is torch.bool:
                blocked_by = call(torch.logical_not, mask)
                scores = call(torch.masked_fill, scores, blocked_by, float("-inf"))
            else:
                scores = call(torch.add, scores, mask)
        weights = call(F.softmax, scores, dim=-1)
    return _replace(graph_module, node, torch.matmul, (weights, value))


def _split(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Every part of a split becomes a slice of its own."""
    source = node.args[0]
    shape = shape_of(source)  # type: ignore[arg-type]
    picks = list(node.users)
    if shape is None or not all(
        user.target is operator.getitem and isinstance(user.args[1], int) for user in picks
    ):
        return False
    meta = torch.empty(shape, device="meta")
    rest = node.args[1:]
    if any(isinstance(a, fx.Node) for a in (*rest, *node.kwargs.values())):
        return False
    if node.op == "call_method":
        parts = getattr(meta, str(node.target))(*rest, **node.kwargs)
    else:
        parts = node.target(meta, *rest, **node.kwargs)  # type: ignore[operator]
    is_unbind = op_name(node, {}) == "unbind"
    axis = _split_axis(node, is_unbind) % len(shape)
    if axis == 0:
        return False
    starts = list(
        itertools.accumulate((0 if is_unbind else p.shape[axis] for p in parts), initial=0)
    )
    for user in picks:
        index = cast(int, user.args[1]) % len(parts)
        with graph_module.graph.inserting_before(user):
            if is_unbind:
                new = graph_module.graph.call_function(torch.select, (source, axis, index))
            else:
                length = parts[index].shape[axis]
                new = graph_module.graph.call_function(
                    torch.narrow, (source, axis, starts[index], length)
                )
        new.meta = dict(user.meta)
        user.replace_all_uses_with(new)
        graph_module.graph.erase_node(user)
    graph_module.graph.erase_node(node)
    return True


def _split_axis(node: fx.Node, is_unbind: bool) -> int:
    position = 1 if is_unbind else 2
    given = node.args[position] if len(node.args) > position else node.kwargs.get("dim", 0)
    return cast(int, given)


def _einsum(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """A matrix product with axes moved, where two operands share one summed axis."""
    equation = node.args[0]
    operands = node.args[1] if isinstance(node.args[1], list | tuple) else node.args[1:]
    if not isinstance(equation, str) or len(operands) != 2:
        return False
    terms, arrow, out = equation.replace(" ", "").partition("->")
    left, comma, right = terms.partition(",")
    letters = (left, right, out)
    if not (arrow and comma) or any(
        len(set(term)) != len(term) or not term.isalpha() for term in letters
    ):
        return False
    summed = [c for c in left if c in right and c not in out]
    batch = [c for c in left if c in right and c in out]
    rows = [c for c in left if c not in right]
    columns = [c for c in right if c not in left]
    if not (len(summed) == len(rows) == len(columns) == 1) or set(out) != set(
        batch + rows + columns
    ):
        return False
    a_order, b_order = batch + rows + summed, batch + summed + columns
    made = batch + rows + columns
    with graph_module.graph.inserting_before(node):
        a, b = (
            _call(graph_module, node, torch.permute, operand, [term.index(c) for c in order])
            for operand, term, order in (
                (operands[0], left, a_order),
                (operands[1], right, b_order),
            )
        )
        product = _call(graph_module, node, torch.matmul, a, b)
    return _replace(graph_module, node, torch.permute, (product, [made.index(c) for c in out]))


def _baddbmm(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """beta · input + alpha · a b."""
    names = ("input", "batch1", "batch2", "beta", "alpha")
    given = {"beta": 1, "alpha": 1} | dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    with graph_module.graph.inserting_before(node):
        total = _call(graph_module, node, torch.matmul, given["batch1"], given["batch2"])
        if given["alpha"] != 1:
            total = _call(graph_module, node, torch.mul, total, given["alpha"])
        addend = given["input"]
        if given["beta"] == 0:
            return _replace(graph_module, node, torch.mul, (total, 1))
        if given["beta"] != 1:
            addend = _call(graph_module, node, torch.mul, addend, given["beta"])
    return _replace(graph_module, node, torch.add, (total, addend))


def _addmm(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    bias, a, b = node.args[:3]
    weight = _transposed_weight(graph_module, b)
    if node.kwargs or weight is None or not isinstance(bias, fx.Node) or bias.op != "get_attr":
        return False
    return _replace(graph_module, node, F.linear, (a, weight, bias))


def _aten_convolution(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    x, w, b, stride, padding, dilation, transposed, output_padding, groups = node.args
    axes = len(shape_of(w) or ()) - 2  # type: ignore[arg-type]
    as_tuple = [
        tuple(v) * (axes if len(v) == 1 else 1) for v in (stride, padding, dilation, output_padding)
    ]  # type: ignore[arg-type]
    op = TABLE[f"conv_transpose{axes}d" if transposed else f"conv{axes}d"]
    if transposed:
        args = (x, w, b, as_tuple[0], as_tuple[1], as_tuple[3], groups, as_tuple[2])
    else:
        args = (x, w, b, as_tuple[0], as_tuple[1], as_tuple[2], groups)
    return _replace(graph_module, node, op.target, args)


def _batch_norm(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """A functional batch norm with constant statistics becomes a module."""
    target = getattr(node.target, "_schema", None)
    if target is not None:
        names = [argument.name for argument in target.arguments]
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    else:
        names = [
            "input",
            "running_mean",
            "running_var",
            "weight",
            "bias",
            "training",
            "momentum",
            "eps",
        ]
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    if given.get("training"):
        return False
    values: dict[str, Any] = {}
    for key in ("running_mean", "running_var", "weight", "bias"):
        source = given.get(key)
        if source is None:
            continue
        if not isinstance(source, fx.Node) or source.op != "get_attr":
            return False
        values[key] = get_attribute(graph_module, str(source.target)).detach()
    if "running_mean" not in values or "running_var" not in values:
        return False
    dimensions = len(shape_of(given["input"]) or ())
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}.get(
        dimensions
    )
    if kind is None:
        return False
    channels = values["running_mean"].numel()
    module = kind(channels, eps=float(given.get("eps", 1e-5)))
    with torch.no_grad():
        for key, value in values.items():
            getattr(module, key).copy_(value)
    path = str(node.meta.get("module_path") or "")
    name = attribute_name(graph_module, f"{path}.batch_norm" if path else node.name)
    graph_module.add_submodule(name, module.eval())
    with graph_module.graph.inserting_before(node):
        new = graph_module.graph.call_module(name, (given["input"],))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph_module.graph.erase_node(node)
    return True


_SPECIAL = {
    "addmm": _addmm,
    "baddbmm": _baddbmm,
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(("chunk", "split", "split_with_sizes", "tensor_split", "unbind"), _split),
    "convolution": _aten_convolution,
    "batch_norm": _batch_norm,
}
