"""The model itself on its example call, before anything is traced: what it returns."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sqakd_fx.diagnostics.source_lines import model_line
from sqakd_fx.diagnostics.wording import with_article
from sqakd_fx.errors import TraceError, short
from sqakd_fx.frontend.caches import outputs_alone
from sqakd_fx.frontend.example_call import Call
from sqakd_fx.frontend.float32 import in_float32
from sqakd_fx.frontend.readable import is_dense, kind_of, line_of_forward

_IN_A_GRAPH = (Tensor, str, int, float, complex, torch.dtype, torch.device, type(None))
"""What an output may hold."""


def example_output(model: nn.Module, call: Call) -> Any:
    """What the model returns in float32; torch is told what is inside the dataclasses of it.

    Raises:
        TraceError: the model does not run, or returns what no file can give.
    """
    own = {name: x.clone() for name, x in call.tensors().items()}  # the model may change them
    args, kwargs = call.with_tensors(own)
    try:
        with torch.no_grad(), in_float32():
            output = model(*args, **kwargs)
    except Exception as error:
        location = model_line(error)
        raise TraceError(
            f"the model does not run in float32 on the example inputs ({short(error)}"
            + (f", {location}" if location else "")
            + "): check example_inputs() or --input-shape",
            location=location,
        ) from error
    _register_dataclasses(output)
    _require_tensors(model, output)
    return output


def _require_tensors(model: nn.Module, output: Any) -> None:
    line = line_of_forward(model)
    leaves = tree_leaves(outputs_alone(output))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    strange = [x for x in leaves if not isinstance(x, _IN_A_GRAPH)]
    wrong = ""
    if strange:
        wrong = f"{with_article(type(strange[0]).__name__)}, inside which no tensor can be followed"
    elif not tensors:
        wrong = f"{_as_said(output)} and no tensor"
    elif sparse := [x for x in tensors if not is_dense(x)]:
        wrong = f"a {kind_of(sparse[0])} tensor, for which ONNX has no form"
    elif not any(x.ndim for x in tensors):
        wrong = "one number for the whole batch"
    if wrong:
        raise TraceError(
            f"the model's forward{f' at {line}' if line else ''} returns {wrong}: return dense tensors with a batch "
            "axis, alone or in tuples, lists, dicts or dataclasses",
            location=line,
        )


def _as_said(output: Any) -> str:
    return "None" if output is None else with_article(type(output).__name__)


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
