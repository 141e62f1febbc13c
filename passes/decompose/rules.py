"""Spell out operations that hide matrix products or moves of values.

Before                                  After
scaled_dot_product_attention(q, k, v)   matmul(softmax(matmul(q, kᵀ) · scale), v)
einsum("bhid,bhjd->bhij", q, k)         see passes/decompose/einsum.py
x.chunk(3, -1)[1]                       narrow(x, -1, start, length)
avg_pool2d(x, 2, divisor_override=3)    see passes/decompose/average_pool.py
embedding_bag(ids, table, mode="sum")   see passes/decompose/embedding_bag.py
x.mT, x.T                               permute(x, axes)
grouped_mm(x, W, offs), histc(x, 8)     see passes/decompose/experts.py
glu(x, 1)                               narrow(x, 1, 0, half) · σ(narrow(x, 1, half, half))
lstm_cell(x, (h, c), W, U, b, d)        σ and tanh of linear(x, W, b) + linear(h, U, d), as gru_cell
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn import functional as F

from sqakd_fx.ir import meta
from sqakd_fx.ir.op_names import op_name
from sqakd_fx.ir.op_table import shape_of
from sqakd_fx.ir.pass_manager import Pass, PassResult
from sqakd_fx.ir.rewriting import (
    call_like,
    constant_of,
    insert_attribute,
    replace_node,
)
from sqakd_fx.passes.decompose.average_pool import POOLS, spell_out_divisor
from sqakd_fx.passes.decompose.einsum import spell_out_einsum
from sqakd_fx.passes.decompose.embedding_bag import spell_out_embedding_bag
from sqakd_fx.passes.decompose.experts import spell_out_grouped_product, spell_out_histogram


@dataclass(frozen=True)
class Decompose(Pass):
    """Spell out attention, einsum, splits and recurrent cells as operations that quantization knows."""

    name = "decompose"

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        modules = dict(graph_module.named_modules())
        changed = False
        for node in list(graph_module.graph.nodes):
            name = op_name(node, modules) or ""
            pool = POOLS.get(name)
            if pool is not None:
                changed = spell_out_divisor(graph_module, node, pool, modules) or changed
            else:
                table = _OF_MODULES if node.op == "call_module" else _DECOMPOSITIONS
                spell_out = table.get(name)
                changed = (spell_out is not None and spell_out(graph_module, node)) or changed
        graph_module.graph.eliminate_dead_code()
        return PassResult(graph_module, changed)


def _attention(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """softmax(q kᵀ scale + mask) v, with matrix products that can be quantized."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    query, key, value = (given[name] for name in names[:3])
    q_shape, k_shape = shape_of(query), shape_of(key)
    if q_shape is None or k_shape is None:
        return False
    scale = given.get("scale")
    scale = 1 / math.sqrt(q_shape[-1]) if scale is None else scale
    with graph_module.graph.inserting_before(node):

        def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
            return call_like(graph_module, node, target, *args, **kwargs)

        if given.get("enable_gqa") and q_shape[-3] != k_shape[-3]:
            repeats = q_shape[-3] // k_shape[-3]
            key = call(torch.repeat_interleave, key, repeats, dim=-3)
            value = call(torch.repeat_interleave, value, repeats, dim=-3)
        scores = call(torch.matmul, query, call(torch.transpose, key, -2, -1))
        scores = call(torch.mul, scores, scale)
        mask = given.get("attn_mask")
        if given.get("is_causal"):
            later = _later_positions(graph_module, node, (query, given["key"]), scores)
            scores = call(torch.masked_fill, scores, later, float("-inf"))
        if isinstance(mask, fx.Node):
            known = mask.meta.get("tensor_meta")
            if getattr(known, "dtype", None) is torch.bool:
                blocked_by = call(torch.logical_not, mask)
                scores = call(torch.masked_fill, scores, blocked_by, float("-inf"))
            else:
                scores = call(torch.add, scores, mask)
        weights = call(F.softmax, scores, dim=-1)
    return replace_node(graph_module, node, torch.matmul, (weights, value))


def _later_positions(
    graph_module: fx.GraphModule, node: fx.Node, inputs: tuple[fx.Node, fx.Node], scores: fx.Node
) -> fx.Node:
    """The mask of causal attention: stored, or computed where the recipe frees the lengths."""
    free = [len(shape_of(one) or ()) - 2 in meta.free_axes(one) for one in inputs]
    if any(free):
        all_of_them = call_like(graph_module, node, torch.ones_like, scores, dtype=torch.bool)
        return call_like(graph_module, node, torch.triu, all_of_them, 1)
    queries, keys = ((shape_of(one) or ())[-2] for one in inputs)
    later = torch.ones(queries, keys, dtype=torch.bool).triu(1)
    return insert_attribute(graph_module, node, f"{node.name}_causal_mask", later)


def _split(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Every part of a split becomes a slice of its own."""
    source = node.args[0]
    shape = shape_of(source)  # type: ignore[arg-type]
    whole = [user for user in node.users if user.target in (torch.cat, torch.stack)]
    picks = [user for user in node.users if user not in whole]
    if shape is None or not all(
        user.target is operator.getitem and isinstance(user.args[1], int) for user in picks
    ):
        return False
    shapes = torch.empty(shape, device="meta")
    rest = node.args[1:]
    if len(node.all_input_nodes) > 1:  # sizes or an axis that are computed
        return False
    if node.op == "call_method":
        parts = getattr(shapes, str(node.target))(*rest, **node.kwargs)
    else:
        parts = node.target(shapes, *rest, **node.kwargs)  # type: ignore[operator]
    drops_axis = bool(parts) and parts[0].ndim < len(shape)
    axis = _split_axis(node, drops_axis) % len(shape)
    if _is_open(cast(fx.Node, source), axis):
        return False
    starts = list(
        itertools.accumulate((0 if drops_axis else p.shape[axis] for p in parts), initial=0)
    )
    for user in whole:
        with graph_module.graph.inserting_before(user):
            taken = [
                graph_module.graph.call_function(operator.getitem, (node, index))
                for index in range(len(parts))
            ]
        for one in taken:
            meta.keep_only_module_path(one, node)
        user.args = tuple(taken if argument is node else argument for argument in user.args)
        user.kwargs = {k: taken if v is node else v for k, v in user.kwargs.items()}
        picks += taken
    for user in picks:
        index = cast(int, user.args[1]) % len(parts)
        with graph_module.graph.inserting_before(user):
            if drops_axis:
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


def _is_open(x: fx.Node, axis: int) -> bool:
    """Whether an axis may have other sizes than on the example."""
    return axis in (0, *meta.batch_axes(x), *meta.free_axes(x))


def _split_axis(node: fx.Node, drops_axis: bool) -> int:
    position = 1 if drops_axis else 2
    given = node.args[position] if len(node.args) > position else node.kwargs.get("dim", 0)
    return cast(int, given)


def _baddbmm(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """beta · input + alpha · a b."""
    names = ("input", "batch1", "batch2", "beta", "alpha")
    given = {"beta": 1, "alpha": 1} | dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    with graph_module.graph.inserting_before(node):
        total = call_like(graph_module, node, torch.matmul, given["batch1"], given["batch2"])
        if given["alpha"] != 1:
            total = call_like(graph_module, node, torch.mul, total, given["alpha"])
        addend = given["input"]
        if given["beta"] == 0:
            return replace_node(graph_module, node, torch.mul, (total, 1))
        if given["beta"] != 1:
            addend = call_like(graph_module, node, torch.mul, addend, given["beta"])
    return replace_node(graph_module, node, torch.add, (total, addend))


def _lstm_cell(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """c' = σ(f) c + σ(i) tanh(g);  h' = σ(o) tanh(c')"""
    x, (h, c), *weights = cast(Any, node.args)
    picks = list(node.users)
    if not all(user.target is operator.getitem for user in picks):
        return False
    with graph_module.graph.inserting_before(node):
        call = _caller(graph_module, node)
        joined = call(torch.add, *_projections(call, x, h, weights))
        i, f, g, o = _gates(call, joined, 4, weights)
        kept = call(torch.mul, call(torch.sigmoid, f), c)
        new = call(torch.mul, call(torch.sigmoid, i), call(torch.tanh, g))
        cell = call(torch.add, kept, new)
        hidden = call(torch.mul, call(torch.sigmoid, o), call(torch.tanh, cell))
    for user in picks:
        user.replace_all_uses_with((hidden, cell)[cast(int, user.args[1])])
        graph_module.graph.erase_node(user)
    graph_module.graph.erase_node(node)
    return True


def _gru_cell(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """h' = n + z (h - n)  with  n = tanh(x_n + r h_n)"""
    x, h, *weights = cast(Any, node.args)
    with graph_module.graph.inserting_before(node):
        call = _caller(graph_module, node)
        of_x, of_h = _projections(call, x, h, weights)
        r_x, z_x, n_x = _gates(call, of_x, 3, weights)
        r_h, z_h, n_h = _gates(call, of_h, 3, weights)
        r = call(torch.sigmoid, call(torch.add, r_x, r_h))
        z = call(torch.sigmoid, call(torch.add, z_x, z_h))
        n = call(torch.tanh, call(torch.add, n_x, call(torch.mul, r, n_h)))
        step = call(torch.mul, z, call(torch.sub, h, n))
    return replace_node(graph_module, node, torch.add, (n, step))


def _rnn_cell(activation: Callable[..., Any], graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """h' = activation(W x + U h)"""
    x, h, *weights = cast(Any, node.args)
    with graph_module.graph.inserting_before(node):
        call = _caller(graph_module, node)
        total = call(torch.add, *_projections(call, x, h, weights))
    return replace_node(graph_module, node, activation, (total,))


def _conv_tbc(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """A convolution of (time, batch, channels) as one of (batch, channels, time)."""
    x, weight, bias, padding = (*cast(Any, node.args), 0)[:4]
    stored = constant_of(graph_module, weight)
    if node.kwargs or stored is None:
        return False
    with graph_module.graph.inserting_before(node):
        call = _caller(graph_module, node)
        kernel = nn.Parameter(stored.detach().permute(2, 1, 0).contiguous())
        kept = insert_attribute(graph_module, node, f"{weight.target}_conv1d", kernel)
        y = call(F.conv1d, call(torch.permute, x, (1, 2, 0)), kept, bias, 1, padding)
    return replace_node(graph_module, node, torch.permute, (y, (2, 0, 1)))


def _rrelu(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """In evaluation the slope is the mean of its two bounds."""
    names = ("input", "lower", "upper", "training")
    given: dict[str, Any] = {"lower": 1 / 8, "upper": 1 / 3}
    given |= dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    if given.get("training"):
        return False
    slope = (given["lower"] + given["upper"]) / 2
    return replace_node(graph_module, node, F.leaky_relu, (given["input"], slope))


def _glu(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """The first half of an axis times the sigmoid of the second (Dauphin 2017): codes have kernels for both."""
    given: dict[str, Any] = {"dim": -1}
    if node.op == "call_module":
        given["dim"] = graph_module.get_submodule(str(node.target)).dim
    given |= dict(zip(("input", "dim"), node.args, strict=False)) | dict(node.kwargs)
    x, shape = given["input"], shape_of(given["input"])
    if shape is None or not isinstance(given["dim"], int):
        return False
    axis = given["dim"] % len(shape)
    if _is_open(x, axis):
        return False
    half = shape[axis] // 2
    with graph_module.graph.inserting_before(node):
        call = _caller(graph_module, node)
        value, gate = (call(torch.narrow, x, axis, start, half) for start in (0, half))
        gate = call(torch.sigmoid, gate)
    return replace_node(graph_module, node, torch.mul, (value, gate))


def _caller(graph_module: fx.GraphModule, node: fx.Node) -> Callable[..., fx.Node]:
    return functools.partial(call_like, graph_module, node)


def _projections(
    call: Callable[..., fx.Node], x: fx.Node, h: fx.Node, weights: list[fx.Node]
) -> tuple[fx.Node, fx.Node]:
    w_x, w_h, b_x, b_h = (*weights, None, None)[:4]
    return call(F.linear, x, w_x, b_x), call(F.linear, h, w_h, b_h)


def _gates(
    call: Callable[..., fx.Node], joined: fx.Node, count: int, weights: list[fx.Node]
) -> list[fx.Node]:
    """The slices of a joined projection that belong to each gate."""
    size = (shape_of(weights[1]) or (0, 0))[1]
    return [call(torch.narrow, joined, -1, i * size, size) for i in range(count)]


def _turned(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """x.T, x.mT, x.H and x.mH of real tensors as permutations, which other operations of the kind are."""
    x, attribute = node.args[:2]
    shape = shape_of(x) if isinstance(x, fx.Node) else None
    known = x.meta.get("tensor_meta") if isinstance(x, fx.Node) else None
    if shape is None or attribute not in _TURNS or getattr(known, "dtype", None) is None:
        return False
    if known.dtype.is_complex or (len(shape) != 2 and attribute == "H") or len(shape) < 2:  # type: ignore[union-attr]
        return False
    axes = list(range(len(shape)))
    axes[-2:] = axes[:-3:-1]
    if attribute == "T":
        axes = list(reversed(range(len(shape))))
    return replace_node(graph_module, node, torch.permute, (x, axes))


_TURNS = ("T", "mT", "H", "mH")
_DECOMPOSITIONS: dict[str, Callable[[fx.GraphModule, fx.Node], bool]] = {
    "scaled_dot_product_attention": _attention,
    "getattr": _turned,
    "einsum": spell_out_einsum,
    "baddbmm": _baddbmm,
    "embedding_bag": spell_out_embedding_bag,
    "grouped_mm": spell_out_grouped_product,
    "histc": spell_out_histogram,
    "lstm_cell": _lstm_cell,
    "gru_cell": _gru_cell,
    "rrelu": _rrelu,
    "glu": _glu,
    "conv_tbc": _conv_tbc,
    "rnn_tanh_cell": functools.partial(_rnn_cell, torch.tanh),
    "rnn_relu_cell": functools.partial(_rnn_cell, F.relu),
    **dict.fromkeys(("chunk", "split", "split_with_sizes", "tensor_split", "unbind"), _split),
}
_OF_MODULES: dict[str, Callable[[fx.GraphModule, fx.Node], bool]] = {"glu": _glu}
