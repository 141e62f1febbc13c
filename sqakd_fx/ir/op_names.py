"""The one name of an operation, whether it is reached as a module, a function, a method, an operator or an overload."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

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
    nn.AdaptiveMaxPool3d: "adaptive_max_pool3d",
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
    """The canonical name of what a node calls, None for the user's own code and for inputs.

    None as well for a module that is not among `modules`: without any, functions and methods are told.
    """
    if node.op == "call_module":
        module = modules.get(str(node.target))
        return None if module is None else module_op_name(module)
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
    F.adaptive_max_pool3d: "adaptive_max_pool3d",
    operator.getitem: "getitem",
}
