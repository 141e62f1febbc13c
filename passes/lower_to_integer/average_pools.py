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
    found = pool_arguments(node, modules, _DEFAULTS)
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
    return bool(pool_arguments(node, modules, _DEFAULTS)["ceil_mode"])


def pool_arguments(
    node: fx.Node, modules: Mapping[str, nn.Module], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """What a pooling is called with behind its input, by the names of `defaults`, in their order."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        return {name: getattr(module, name, value) for name, value in defaults.items()}
    given = dict(zip(defaults, node.args[1:], strict=False))
    return {**defaults, **given, **{k: v for k, v in node.kwargs.items() if k in defaults}}


def adaptive_pool_settings(ins: Sequence[int], outs: Sequence[int]) -> tuple[Any, ...] | None:
    """The same for adaptive pooling of the sizes `ins`, without N and C; None where its windows differ in size."""
    if any(i % o for i, o in zip(ins, outs, strict=True)):
        return None
    kernel = [i // o for i, o in zip(ins, outs, strict=True)]
    none = [0] * len(kernel)
    return kernel, kernel, none, none, True
