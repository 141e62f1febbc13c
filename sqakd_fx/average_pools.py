"""Average pooling as the integer program computes it: windows, padding at both ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx, nn


def pool_settings(
    node: fx.Node,
    modules: Mapping[str, nn.Module],
    ins: Sequence[int],
    outs: Sequence[int],
) -> tuple[Any, ...] | None:
    """Kernel, stride, padding at both ends, and whether padding counts.

    None where no integer kernel computes this pooling. Shapes are (N, C, ...).
    """
    axes = len(ins) - 2
    names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
    defaults: dict[str, Any] = dict(zip(names, (None, None, 0, False, True), strict=True))
    if node.op == "call_module":
        module = modules[str(node.target)]
        found = {name: getattr(module, name) for name in names}
        divisor = getattr(module, "divisor_override", None)
    else:
        found = defaults | dict(zip(names, node.args[1:], strict=False))
        found |= {k: v for k, v in node.kwargs.items() if k in names}
        divisor = node.kwargs.get("divisor_override")
    if divisor is not None:
        return None
    if found["stride"] in (None, [], ()):
        found["stride"] = found["kernel_size"]
    kernel, stride, padding = (
        [v] * axes if isinstance(v, int) else list(v) * (axes if len(v) == 1 else 1)
        for v in (found["kernel_size"], found["stride"], found["padding"])
    )
    count_pads = bool(found["count_include_pad"]) and any(padding)
    ends = list(padding)
    if found["ceil_mode"]:
        # ONNX Runtime's integer kernel is wrong with ceil_mode: the last window is padded instead
        ends = [
            p + max(0, (o - 1) * s + k - (i + 2 * p))
            for i, o, k, s, p in zip(ins[2:], outs[2:], kernel, stride, padding, strict=True)
        ]
        if count_pads and ends != padding:
            return None
    return kernel, stride, padding, ends, count_pads


def adaptive_pool_settings(ins: Sequence[int], outs: Sequence[int]) -> tuple[Any, ...] | None:
    """The same for adaptive pooling; None where its windows differ in size."""
    if any(i % o for i, o in zip(ins[2:], outs[2:], strict=True)):
        return None
    kernel = [i // o for i, o in zip(ins[2:], outs[2:], strict=True)]
    none = [0] * len(kernel)
    return kernel, kernel, none, none, True
