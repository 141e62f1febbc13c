"""Values of a graph while torch's exporter translates it."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
from onnxscript import opset21 as op

Value: TypeAlias = Any
"""A symbolic tensor of torch's exporter, which gives its type no public name."""


def constant(values: Any, kind: Any = None) -> Value:
    """A constant of numbers, of the dtype `kind` or their own."""
    return op.Constant(value=ir.tensor(np.asarray(values, dtype=kind)))
