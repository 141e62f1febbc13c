"""Give every operation that quantization cares about one form.

    Before:  y = self.conv(x)                       y = x.add_(z)          y = aten.addmm(b, x, wT)
    After:   y = F.conv2d(x, conv_weight, ...)      y = torch.add(x, z)    y = F.linear(x, w, b)

Convolutions, linear layers, matrix products, sums, products and clips become calls of the op
table's target with all arguments in order; parameters become get_attr nodes. What is the identity in
evaluation (dropout, a cast from float32 to float32) disappears: the student is trained to match a
teacher that has none.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn import functional as F

from sqakd_fx.ir import meta
from sqakd_fx.ir.op_names import op_name
from sqakd_fx.ir.op_table import CASTS, LAYS_OUT, TABLE, Kind, Op, convolution, op_of, shape_of
from sqakd_fx.ir.pass_manager import Note, Pass, PassResult
from sqakd_fx.ir.rewriting import (
    attribute_name,
    constant_of,
    drop_unused,
    get_attribute,
    insert_attribute,
    name_once,
    read_attribute,
    replace_node,
)


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Give each operation of the op table one form, and drop what is the identity in evaluation."""

    name = "canonicalize"

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        modules = dict(graph_module.named_modules())
        notes: list[Note] = []
        changed = name_once(graph_module)
        for node in list(graph_module.graph.nodes):
            if node._erased:
                continue
            name = op_name(node, modules)
            op = TABLE.get(name) if name else None
            rewritten = _rewrite(graph_module, node, name, op, modules, notes)
            changed = changed or rewritten
        changed = graph_module.graph.eliminate_dead_code() or changed
        changed = name_once(graph_module) or changed
        drop_unused(graph_module)
        return PassResult(graph_module, changed, tuple(notes))


def _may_need_order(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """True for an operation of which the table does not know that it takes memory in any order."""
    return node.op != "output" and op_of(node, modules) is None


def _is_idle(node: fx.Node, name: str | None, modules: dict[str, nn.Module]) -> bool:
    """True where float32 goes in and the same float32 comes out."""
    source = node.args[0] if node.args else None
    if name not in CASTS or not isinstance(source, fx.Node):
        return False
    if name in LAYS_OUT and any(_may_need_order(user, modules) for user in node.users):
        return False
    known = [n.meta.get("tensor_meta") for n in (source, node)]
    return all(getattr(one, "dtype", None) is torch.float32 for one in known)


def _rewrite(
    graph_module: fx.GraphModule,
    node: fx.Node,
    name: str | None,
    op: Op | None,
    modules: dict[str, nn.Module],
    notes: list[Note],
) -> bool:
    special = _SPECIAL.get(name or "")
    called = node.op in ("call_function", "call_method")
    if special is not None and called and special(graph_module, node):
        return True
    if _is_idle(node, name, modules):
        node.replace_all_uses_with(node.all_input_nodes[0])
        graph_module.graph.erase_node(node)
        return True
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
    if op.is_convolution:
        _spell_out_padding(graph_module, node, op, arguments)
    with graph_module.graph.inserting_before(node):
        new = graph_module.graph.call_function(op.target, tuple(arguments.values()))
    new.meta = dict(node.meta)
    if node.op == "call_module":
        meta.set_module_path(new, str(node.target))
        meta.set_is_module(new, True)
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
    arguments = _bind(op, node.args, kwargs)
    if op.kind not in (Kind.SUM, Kind.PRODUCT):
        return arguments
    if shape_of(node) is None:
        return None
    if not isinstance(arguments["input"], fx.Node):
        if not op.commutes:
            return None
        arguments = {"input": arguments["other"], "other": arguments["input"]}
    return arguments


def _bind(op: Op, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All canonical arguments of a call, by name; raises TypeError where the call does not fit."""
    names = op.arguments
    if len(args) > len(names):
        raise TypeError(f"{op.name} takes {len(names)} arguments, {len(args)} given")
    bound = dict(zip(names[len(names) - len(op.defaults) :], op.defaults, strict=True))
    bound |= dict(zip(names, args, strict=False))
    for key, value in kwargs.items():
        key = {"self": "input", "mat2": "other", "inplace": ""}.get(key, key)
        if not key:
            continue
        if key not in names:
            raise TypeError(f"{op.name} has no argument {key!r}")
        bound[key] = value
    missing = [name for name in names if name not in bound]
    if missing:
        raise TypeError(f"{op.name} needs {', '.join(missing)}")
    return {name: bound[name] for name in names}


def _module_arguments(
    graph_module: fx.GraphModule, node: fx.Node, op: Op, module: nn.Module
) -> dict[str, Any]:
    given: dict[str, Any] = {"input": node.args[0] if node.args else node.kwargs["input"]}
    for argument in op.arguments[1:]:
        value = getattr(module, argument, None)
        if isinstance(value, nn.Parameter):
            with graph_module.graph.inserting_before(node):
                value = read_attribute(graph_module, f"{node.target}.{argument}")
        given[argument] = value
    if op.transposed and (node.args[1:] or "output_size" in node.kwargs):
        given["output_padding"] = _output_padding(node, module)
    if getattr(module, "padding_mode", "zeros") != "zeros":
        amounts = [int(x) for x in module._reversed_padding_repeated_twice]  # type: ignore[union-attr]
        with graph_module.graph.inserting_before(node):
            padded = graph_module.graph.call_function(
                F.pad, (given["input"], amounts), {"mode": str(module.padding_mode)}
            )
        meta.set_module_path(padded, str(node.target))
        given["input"], given["padding"] = padded, 0
    return _bind(op, (), given)


def _output_padding(node: fx.Node, module: Any) -> tuple[int, ...]:
    """What reaches the output_size that a transposed convolution was called with."""
    ins, outs = shape_of(node.all_input_nodes[0]) or (), shape_of(node) or ()
    return tuple(
        out - ((size - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1)
        for size, out, stride, padding, dilation, kernel in zip(
            ins[2:],
            outs[2:],
            module.stride,
            module.padding,
            module.dilation,
            module.kernel_size,
            strict=True,
        )
    )


def _spell_out_padding(
    graph_module: fx.GraphModule, node: fx.Node, op: Op, arguments: dict[str, Any]
) -> None:
    """'same' and 'valid' become numbers, and every per-axis setting a tuple."""
    axes = op.axes or 0
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


def _is_off(node: fx.Node) -> bool:
    training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else None)
    return training is False


def _transposed_weight(graph_module: fx.GraphModule, node: Any) -> fx.Node | None:
    """The (out, in) weight whose transpose `node` is, made where it is a constant."""
    if not isinstance(node, fx.Node):
        return None
    source = node
    if node.op == "call_function" or node.op == "call_method":
        op, inner = op_of(node, {}), node.args[0] if node.args else None
        if op is not None and op.permutes and isinstance(inner, fx.Node):
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
    wanted, transposed = f"{source.target}_transposed", weight.detach().t().contiguous()
    known = _parameter(graph_module, wanted)
    if known is not None and torch.equal(known, transposed):
        with graph_module.graph.inserting_before(source):
            return graph_module.graph.get_attr(wanted)
    return insert_attribute(graph_module, source, wanted, nn.Parameter(transposed))


def _parameter(graph_module: fx.GraphModule, name: str) -> nn.Parameter | None:
    try:
        return graph_module.get_parameter(name)
    except AttributeError:
        return None


def _matmul(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """x W with a constant matrix is a linear layer; False leaves a product of two activations."""
    if len(node.args) != 2 or node.kwargs or constant_of(graph_module, node.args[1]) is None:
        return False
    weight = _transposed_weight(graph_module, node.args[1])
    if weight is None or len(shape_of(node.args[0]) or ()) < 2:  # type: ignore[arg-type]
        return False
    return replace_node(graph_module, node, F.linear, (node.args[0], weight, None))


def _addmm(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    bias, a, b = node.args[:3]
    weight = _transposed_weight(graph_module, b)
    if node.kwargs or weight is None or not isinstance(bias, fx.Node) or bias.op != "get_attr":
        return False
    return replace_node(graph_module, node, F.linear, (a, weight, bias))


def _aten_convolution(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    arguments: Any = node.args
    x, w, b, stride, padding, dilation, transposed, output_padding, groups = arguments
    axes = len(shape_of(w) or ()) - 2
    args: tuple[Any, ...]
    as_tuple = [
        tuple(v) * (axes if len(v) == 1 else 1) for v in (stride, padding, dilation, output_padding)
    ]
    op = convolution(axes, transposed=transposed)
    if transposed:
        args = (x, w, b, as_tuple[0], as_tuple[1], as_tuple[3], groups, as_tuple[2])
    else:
        args = (x, w, b, as_tuple[0], as_tuple[1], as_tuple[2], groups)
    return replace_node(graph_module, node, op.target, args)


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
    gives_statistics = target is not None and len(target.returns) > 1
    outputs = list(node.users) if gives_statistics else [node]
    if gives_statistics and any(pick.args[1:] != (0,) for pick in outputs):
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
    path = meta.module_path(node)
    name = attribute_name(graph_module, f"{path}.batch_norm" if path else node.name)
    graph_module.add_submodule(name, module.eval())
    with graph_module.graph.inserting_before(node):
        new = graph_module.graph.call_module(name, (given["input"],))
    new.meta = dict(outputs[0].meta if outputs else node.meta)
    for output in outputs:
        output.replace_all_uses_with(new)
    if not node.users:
        graph_module.graph.erase_node(node)
    return True


def _view(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """A view that may copy: `contiguous` in front of it has been dropped."""
    shape = node.args[1:] if len(node.args) > 1 else ()
    if node.kwargs or not shape or any(isinstance(size, torch.dtype) for size in shape):
        return False
    sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], list | tuple | fx.Node) else shape
    if isinstance(sizes, fx.Node) and "tensor_meta" not in sizes.meta and _is_number(sizes):
        sizes = (sizes,)
    return replace_node(graph_module, node, torch.reshape, (node.args[0], sizes))


def _is_number(node: fx.Node) -> bool:
    return node.target is operator.getitem or node.meta.get("type") is int


def _adaptive_max_pool(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """An overload gives the places of the maxima too; where nobody reads them, it becomes the plain function."""
    picks = list(node.users)
    gives_places = isinstance(node.target, torch._ops.OpOverload)
    if not gives_places or any(pick.args[1:] != (0,) for pick in picks):
        return False
    axes = len(cast(Any, node.args[1]))
    target = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}[axes]
    with graph_module.graph.inserting_before(node):
        new = graph_module.graph.call_function(target, (node.args[0], node.args[1]))
    new.meta = dict(picks[0].meta if picks else node.meta)
    for pick in picks:
        pick.replace_all_uses_with(new)
        graph_module.graph.erase_node(pick)
    graph_module.graph.erase_node(node)
    return True


def _channel_shuffle(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """torch.export writes the batch size of the example into the native one."""
    arguments = (*node.args, *node.kwargs.values())
    return replace_node(graph_module, node, F.channel_shuffle, arguments)


_SPECIAL = {
    "native_channel_shuffle": _channel_shuffle,
    **dict.fromkeys((f"adaptive_max_pool{n}d" for n in (1, 2, 3)), _adaptive_max_pool),
    "view": _view,
    "addmm": _addmm,
    "matmul": _matmul,
    "convolution": _aten_convolution,
    "batch_norm": _batch_norm,
}
