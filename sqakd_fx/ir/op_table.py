"""The op table: the one place that knows what a convolution is.

An operation has one row, whether the user reached it as a module, a function, a tensor method, a
Python operator or an aten overload: `op_name` reduces all five to the same name. Every pass asks
the table; none has a list of classes of its own.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F


class Kind(Enum):
    """What a quantizer insertion needs to know of an operation."""

    COMPUTE = "multiplies and accumulates: its inputs are quantized"
    SUM = "adds two tensors: its inputs are quantized"
    PRODUCT = "multiplies two tensors element by element: its inputs are quantized"
    AVERAGE = "averages values of one tensor: its input is quantized"
    CLIP = "is a monotone clip, merged into the grid of the quantizer behind it"
    TRANSPARENT = "moves or selects values: the output is on the input's grid"
    JOINT = "moves values of several tensors into one: they share one grid"
    SMOOTH = "is a nonlinear function, computed in float between quantized tensors"
    BATCH_NORM = "is an affine per channel in evaluation"
    NOISE = "is the identity in evaluation"
    SHAPE = "computes sizes, not values"


@dataclass(frozen=True)
class Op:
    """One row of the table.

    Attributes:
        name: the canonical name, see `op_name`.
        kind: how quantization treats it.
        arguments: canonical argument names, in order (compute and clip rows only).
        defaults: their default values, from the last argument backwards.
        activations: positions of the arguments that are quantized as activations.
        weight: position of the weight argument, None where there is none.
        channel_axis: output channel axis of the weight.
        target: the function that the canonical form calls.
    """

    name: str
    kind: Kind
    arguments: tuple[str, ...] = ()
    defaults: tuple[Any, ...] = ()
    activations: tuple[int, ...] = (0,)
    weight: int | None = None
    channel_axis: int = 0
    target: Any = None


_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_CONV_TRANSPOSE = (
    "input",
    "weight",
    "bias",
    "stride",
    "padding",
    "output_padding",
    "groups",
    "dilation",
)

_COMPUTE = [
    Op(f"conv{n}d", Kind.COMPUTE, _CONV, (None, 1, 0, 1, 1), weight=1, target=target)
    for n, target in ((1, F.conv1d), (2, F.conv2d), (3, F.conv3d))
]
_COMPUTE += [
    Op(
        f"conv_transpose{n}d",
        Kind.COMPUTE,
        _CONV_TRANSPOSE,
        (None, 1, 0, 0, 1, 1),
        weight=1,
        channel_axis=1,
        target=target,
    )
    for n, target in ((1, F.conv_transpose1d), (2, F.conv_transpose2d), (3, F.conv_transpose3d))
]
_COMPUTE += [
    Op("linear", Kind.COMPUTE, ("input", "weight", "bias"), (None,), weight=1, target=F.linear),
    Op("matmul", Kind.COMPUTE, ("input", "other"), activations=(0, 1), target=torch.matmul),
]

_CLIPS = [
    Op("relu", Kind.CLIP, ("input",), target=F.relu),
    Op("relu6", Kind.CLIP, ("input",), target=F.relu6),
    Op("hardtanh", Kind.CLIP, ("input", "min_val", "max_val"), (-1.0, 1.0), target=F.hardtanh),
    Op("clamp", Kind.CLIP, ("input", "min", "max"), (None, None), target=torch.clamp),
]


def _rows(kind: Kind, names: str, **fields: Any) -> list[Op]:
    return [Op(name, kind, **fields) for name in names.split()]


TABLE: Mapping[str, Op] = {
    op.name: op
    for op in (
        *_COMPUTE,
        *_CLIPS,
        Op("add", Kind.SUM, ("input", "other"), activations=(0, 1), target=torch.add),
        Op("sub", Kind.SUM, ("input", "other"), activations=(0, 1), target=torch.sub),
        Op("mul", Kind.PRODUCT, ("input", "other"), activations=(0, 1), target=torch.mul),
        *_rows(
            Kind.AVERAGE,
            "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
            "adaptive_avg_pool3d mean",
        ),
        *_rows(
            Kind.TRANSPARENT,
            "max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d flatten "
            "reshape view unflatten permute transpose t squeeze unsqueeze expand expand_as repeat "
            "repeat_interleave contiguous clone detach identity getitem narrow select slice chunk "
            "split tensor_split unbind split_with_sizes roll flip pixel_shuffle pixel_unshuffle "
            "channel_shuffle movedim swapaxes tile gather index_select amax alias view_as "
            "reshape_as unfold to float",
        ),
        *_rows(
            Kind.TRANSPARENT,
            "nearest_interpolate upsample_nearest1d upsample_nearest2d upsample_nearest3d zero_pad",
        ),
        *_rows(Kind.JOINT, "cat stack maximum minimum"),
        *_rows(
            Kind.SMOOTH,
            "sigmoid hardsigmoid silu hardswish gelu softmax log_softmax tanh leaky_relu elu selu "
            "celu mish softplus prelu layer_norm group_norm instance_norm rms_norm local_response_norm "
            "scaled_dot_product_attention exp log sqrt rsqrt pow div erf sin cos neg abs sum norm "
            "normalize embedding interpolate upsample upsample_bilinear2d upsample_bicubic2d "
            "upsample_linear1d upsample_trilinear3d grid_sample einsum where cumsum var std "
            "gru lstm rnn baddbmm pad softsign logsigmoid glu "
            "max_pool_with_indices im2col col2im masked_fill sign square reciprocal linalg_vector_norm vector_norm",
        ),
        *_rows(
            Kind.NOISE, "dropout alpha_dropout feature_alpha_dropout stochastic_depth drop_path"
        ),
        *_rows(Kind.BATCH_NORM, "batch_norm"),
        *_rows(Kind.SHAPE, "size getattr dim numel shape len floordiv sym_size"),
    )
}

# Operations whose output may be the memory of their first input.
VIEWS = frozenset(
    name
    for names in (
        "flatten reshape view view_as reshape_as unflatten squeeze unsqueeze expand expand_as",
        "permute transpose t movedim swapaxes numpy_T getitem narrow select slice diagonal unfold",
        "chunk split split_with_sizes tensor_split unbind real imag",
        "contiguous detach alias identity to float",
    )
    for name in names.split()
)

OPERATION_ATTRIBUTE = "sqakd_fx_operation"
"""The class attribute by which a module of this package names its row."""

_MODULE_NAMES: Mapping[type[nn.Module], str] = {
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
    nn.ConvTranspose1d: "conv_transpose1d",
    nn.ConvTranspose2d: "conv_transpose2d",
    nn.ConvTranspose3d: "conv_transpose3d",
    nn.BatchNorm1d: "batch_norm",
    nn.BatchNorm2d: "batch_norm",
    nn.BatchNorm3d: "batch_norm",
    nn.SyncBatchNorm: "batch_norm",
    nn.Unfold: "im2col",
    nn.Fold: "col2im",
    nn.Dropout1d: "dropout",
    nn.Dropout2d: "dropout",
    nn.Dropout3d: "dropout",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.GELU: "gelu",
    nn.SiLU: "silu",
    nn.CELU: "celu",
    nn.ELU: "elu",
    nn.SELU: "selu",
    nn.PReLU: "prelu",
    nn.LSTM: "lstm",
    nn.GRU: "gru",
    nn.RNN: "rnn",
    nn.GLU: "glu",
    nn.LeakyReLU: "leaky_relu",
    nn.MaxPool1d: "max_pool1d",
    nn.MaxPool2d: "max_pool2d",
    nn.MaxPool3d: "max_pool3d",
    nn.AvgPool1d: "avg_pool1d",
    nn.AvgPool2d: "avg_pool2d",
    nn.AvgPool3d: "avg_pool3d",
    nn.AdaptiveAvgPool1d: "adaptive_avg_pool1d",
    nn.AdaptiveAvgPool2d: "adaptive_avg_pool2d",
    nn.AdaptiveAvgPool3d: "adaptive_avg_pool3d",
    nn.AdaptiveMaxPool1d: "adaptive_max_pool1d",
    nn.AdaptiveMaxPool2d: "adaptive_max_pool2d",
}

_ALIASES: Mapping[str, str] = {
    "iadd": "add",
    "isub": "sub",
    "imul": "mul",
    "truediv": "div",
    "itruediv": "div",
    "true_divide": "div",
    "multiply": "mul",
    "subtract": "sub",
    "concat": "cat",
    "concatenate": "cat",
    "mm": "matmul",
    "bmm": "matmul",
    "imatmul": "matmul",
    "unsafe_view": "view",
    "adaptive_avg_pool2d": "adaptive_avg_pool2d",
    "scaled_dot_product_attention": "scaled_dot_product_attention",
    "clip": "clamp",
    "boolean_dispatch": "max_pool2d",
    "native_layer_norm": "layer_norm",
    "sigmoid_": "sigmoid",
    "swapdims": "transpose",
    "hard_sigmoid": "hardsigmoid",
    "native_batch_norm_legit_no_training": "batch_norm",
    "constant_pad_nd": "pad",
    "threshold": "threshold",
}


def op_name(node: fx.Node, modules: Mapping[str, nn.Module]) -> str | None:
    """The canonical name of what a node calls, None for the user's own code and for inputs."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        return module_op_name(module)
    if node.op == "call_method":
        return _tidy(str(node.target))
    if node.op != "call_function":
        return None
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        namespace, _, name = target._schema.name.partition("::")
        return _tidy(name) if namespace == "aten" else None
    if target in _DISPATCHED:
        return _DISPATCHED[target]
    module_name = getattr(target, "__module__", None) or ""
    name = getattr(target, "__name__", "")
    known = module_name.startswith(("torch", "_operator", "operator")) or module_name in (
        "",
        "builtins",
    )
    return _tidy(name) if known else None


def module_op_name(module: nn.Module) -> str | None:
    """The canonical name of what a leaf module computes, None for a user's own module."""
    kind = type(module)
    named = getattr(kind, OPERATION_ATTRIBUTE, None)
    if named is not None:
        return str(named)
    if kind in _MODULE_NAMES:
        return _MODULE_NAMES[kind]
    if kind.__module__.startswith("torch.nn."):
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", kind.__name__).lower()
    return None


def op_of(node: fx.Node, modules: Mapping[str, nn.Module]) -> Op | None:
    """The node's row, None where the table has none."""
    name = op_name(node, modules)
    if name in ("interpolate", "upsample") and _is_nearest(node, modules):
        name = "nearest_interpolate"
    elif name == "pad" and pad_amounts(node) is not None:
        pooled = all("max_pool" in (op_name(user, modules) or "") for user in node.users)
        if pad_value(node) == 0 or pooled:
            name = "zero_pad"
    elif name and "max_pool" in name and _returns_indices(node, modules):
        name = "max_pool_with_indices"
    return TABLE.get(name) if name else None


def _returns_indices(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """True for a max pool that gives the places of its maxima beside them."""
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "return_indices", False))
    overload = str(getattr(node.target, "_schema", ""))
    return "with_indices" in overload or bool(node.kwargs.get("return_indices", False))


def _is_nearest(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """True for an interpolation that copies values."""
    if node.op == "call_module":
        return getattr(modules[str(node.target)], "mode", "nearest") == "nearest"
    mode = node.kwargs.get("mode", node.args[3] if len(node.args) > 3 else "nearest")
    return mode == "nearest"


def pad_amounts(node: fx.Node) -> tuple[int, ...] | None:
    """What F.pad adds at each side, last axis first; None where it pads with other than 0 or -inf."""
    if node.op != "call_function":
        return None
    amounts, mode = _argument(node, 1, "pad"), _argument(node, 2, "mode")
    constant = mode in (None, "constant", 0, 0.0) and pad_value(node) in (0.0, -math.inf)
    if not constant or not isinstance(amounts, list | tuple):
        return None
    return tuple(amounts) if all(isinstance(a, int) for a in amounts) else None


def pad_value(node: fx.Node) -> float:
    """What F.pad pads with."""
    value = _argument(node, 3, "value")
    return float(value) if isinstance(value, int | float) else 0.0


def _argument(node: fx.Node, position: int, name: str) -> Any:
    return node.kwargs.get(name, node.args[position] if len(node.args) > position else None)


def _tidy(name: str) -> str:
    name = name.strip("_")
    return _ALIASES.get(name, name)


_DISPATCHED: dict[Any, str] = {
    F.unfold: "im2col",
    F.fold: "col2im",
    F.max_pool1d: "max_pool1d",
    F.max_pool2d: "max_pool2d",
    F.max_pool3d: "max_pool3d",
    F.adaptive_max_pool1d: "adaptive_max_pool1d",
    F.adaptive_max_pool2d: "adaptive_max_pool2d",
    operator.getitem: "getitem",
}


def bind(op: Op, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
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


def is_float_tensor(node: fx.Node) -> bool:
    """True where shape propagation saw a floating-point tensor at this node."""
    meta = node.meta.get("tensor_meta")
    dtype = getattr(meta, "dtype", None)
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """The shape that shape propagation saw, None for what is not a tensor."""
    meta = node.meta.get("tensor_meta")
    shape = getattr(meta, "shape", None)
    return None if shape is None else tuple(shape)


def node_macs(node: fx.Node) -> int:
    """Multiply-accumulates of a canonical convolution, linear layer or matrix product.

    Sizes are those that shape propagation saw; 0 where they are unknown.
    """
    ins, outs = shape_of(node.all_input_nodes[0]), shape_of(node)
    op = TABLE.get(getattr(node.target, "__name__", ""))
    if ins is None or outs is None or op is None or op.kind is not Kind.COMPUTE:
        return 0
    if op.weight is None:
        return math.prod(outs) * ins[-1]
    weight = shape_of(node.args[op.weight])  # type: ignore[arg-type]
    if weight is None:
        return 0
    if op.name.startswith("conv_transpose"):
        return math.prod(ins) * math.prod(weight[1:])
    return math.prod(outs) * math.prod(weight[1:])
