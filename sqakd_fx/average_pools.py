"""Average pooling as the integer program computes it: windows, padding at both ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx, nn

_DEFAULTS: dict[str, Any] = {
    "kernel_size": None,
    "stride": None,
    "padding": 0,
    "ceil_mode": False,
    "count_include_pad": True,
    "divisor_override": None,
}
"""In the order of torch.nn.functional.avg_pool2d."""


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
    found = _arguments(node, modules)
    if found["divisor_override"] is not None:
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


def rounds_up(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """True for a pooling whose last windows may go beyond the end (ceil_mode)."""
    return bool(_arguments(node, modules)["ceil_mode"])


def _arguments(node: fx.Node, modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    """What an average pooling is called with, by name."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        return {name: getattr(module, name, value) for name, value in _DEFAULTS.items()}
    given = dict(zip(_DEFAULTS, node.args[1:], strict=False))
    return _DEFAULTS | given | {k: v for k, v in node.kwargs.items() if k in _DEFAULTS}


def adaptive_pool_settings(ins: Sequence[int], outs: Sequence[int]) -> tuple[Any, ...] | None:
    """The same for adaptive pooling; None where its windows differ in size."""
    if any(i % o for i, o in zip(ins[2:], outs[2:], strict=True)):
        return None
    kernel = [i // o for i, o in zip(ins[2:], outs[2:], strict=True)]
    none = [0] * len(kernel)
    return kernel, kernel, none, none, True
