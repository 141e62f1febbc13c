"""Group normalization by the kernel that ONNX Runtime has for instance normalization.

    Before:  y = GroupNormalization(x, weight, bias)
    After:   y = InstanceNormalization(x as (N, groups, rest)) as x · weight + bias

The runtime takes GroupNormalization apart into some twenty operators over the whole tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from onnxscript import opset21 as op

from sqakd_fx.exporters.symbolic import Value, constant


def _group_norm(
    input: Value,
    num_groups: int,
    weight: Value | None = None,
    bias: Value | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Value:
    one, zero = (constant(np.full(num_groups, x), np.float32) for x in (1.0, 0.0))
    rows = op.Reshape(input, constant([0, num_groups, -1], np.int64))
    rows = op.InstanceNormalization(rows, one, zero, epsilon=eps)
    y = op.Reshape(rows, op.Shape(input))
    if weight is not None:
        y = op.Mul(y, _by_channel(weight, input))
    return y if bias is None else op.Add(y, _by_channel(bias, input))


def _by_channel(values: Value, like: Value) -> Value:
    """(channels,) against (N, channels, ...)."""
    behind = list(range(1, len(like.shape) - 1))
    return op.Unsqueeze(values, constant(behind, np.int64)) if behind else values


GROUP_NORM: dict[Any, Callable[..., Any]] = {torch.ops.aten.group_norm.default: _group_norm}
