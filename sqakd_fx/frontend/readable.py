"""Models of which nothing can be traced, whatever their forward does: without Python code, or without dense values."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sqakd_fx.diagnostics.wording import with_article
from sqakd_fx.errors import TraceError
from sqakd_fx.integrations.detectors import is_detector


def require_readable(model: nn.Module) -> None:
    """Raise TraceError for TorchScript, a whole detector, and weights that are on the meta device or not dense.

    What is no nn.Module is refused too: a function, or a class.
    """
    if not isinstance(model, nn.Module):
        raise TraceError(
            f"the model is {with_article(type(model).__name__)}, not an nn.Module: give the module itself, or one "
            "whose forward calls it"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError(
            "the model is TorchScript, which has no Python code to trace: give the Python module that "
            "it was made from, with its weights by load_state_dict(scripted.state_dict())"
        )
    if is_detector(model):
        raise TraceError(
            f"{type(model).__name__} is a whole detector: it resizes a list of images and chooses boxes in Python, "
            "which no file does: quantize its backbone and heads, sqakd_fx.integrations.detectors.parts(model)"
        )
    quantized = [x for x in model.modules() if ".quantized" in type(x).__module__]
    if quantized:
        raise TraceError(
            f"the model is quantized already: it holds a {type(quantized[0]).__name__} of "
            f"{type(quantized[0]).__module__.rpartition('.modules')[0]}: give the float model that it was made from"
        )
    tensors: list[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in tensors:
        if is_lazy(tensor):  # the first call gives it values
            continue
        if tensor.is_meta:
            raise TraceError(
                f"{name} has no values, as it lies on torch's meta device: call "
                "model.to_empty(device='cpu') and load its weights in model()"
            )
        if not is_dense(tensor):
            raise TraceError(
                f"{name} is a {kind_of(tensor)} tensor, for which ONNX has no form: keep it dense, as "
                "by to_dense(), and multiply with torch.matmul"
            )


def refuse_detector_inside(model: nn.Module, cause: TraceError) -> None:
    """Raise TraceError where a model that cannot be traced holds a detector."""
    path = next((path for path, module in model.named_modules() if is_detector(module)), None)
    if path is not None:
        raise TraceError(
            f"the model holds a whole detector at {path!r}, which resizes a list of images and chooses boxes in "
            "Python: give its backbone and heads, sqakd_fx.integrations.detectors.parts(detector)",
            location=cause.location,
        ) from cause


def require_values(model: nn.Module) -> None:
    """Raise TraceError where a lazy layer has never been called."""
    lazy = [name for name, tensor in model.named_parameters() if is_lazy(tensor)]
    lazy += [name for name, tensor in model.named_buffers() if is_lazy(tensor)]
    if lazy:
        raise TraceError(
            f"{lazy[0]} has no values yet, as its layer is lazy: call the model once on an example "
            "in model()"
        )


def is_dense(x: Tensor) -> bool:
    return x.layout is torch.strided and not x.is_nested


def kind_of(x: Tensor) -> str:
    """As `nested` or `sparse_csr`."""
    return "nested" if x.is_nested else str(x.layout).removeprefix("torch.")


def line_of_forward(model: nn.Module) -> str | None:
    """file:line of the model's forward."""
    forward: Any = inspect.unwrap(type(model).forward)
    code = getattr(forward, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else None
