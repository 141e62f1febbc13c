"""The model itself on its example call, before anything is traced: what it returns."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from sqakd_fx.diagnostics.source_lines import model_line
from sqakd_fx.errors import TraceError, first_line
from sqakd_fx.frontend.example_call import Call
from sqakd_fx.frontend.float32 import in_float32


def example_output(model: nn.Module, call: Call) -> Any:
    """What the model returns in float32; torch is told what is inside the dataclasses of it.

    Raises:
        TraceError: the model does not run.
    """
    args, kwargs = call.with_tensors(call.tensors())
    try:
        with torch.no_grad(), in_float32():
            output = model(*args, **kwargs)
    except Exception as error:
        location = model_line(error)
        raise TraceError(
            f"the model does not run in float32 on the example inputs ({first_line(error)}"
            + (f", {location}" if location else "")
            + "): check example_inputs() or --input-shape",
            location=location,
        ) from error
    _register_dataclasses(output)
    return output


def _register_dataclasses(output: Any) -> None:
    pending = [output]
    while pending:
        leaf = pending.pop()
        if isinstance(leaf, Tensor):
            continue
        kind = type(leaf)
        if dataclasses.is_dataclass(leaf) and kind not in torch.utils._pytree.SUPPORTED_NODES:
            torch.export.register_dataclass(kind)
        leaves = torch.utils._pytree.tree_leaves(leaf)
        pending.extend(one for one in leaves if one is not leaf)
