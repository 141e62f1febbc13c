"""LSTM and GRU layers as one operation each while a graph is exported.

torch.export finds the shapes of their results by running every time step on tensors without values, one operation
of Python after the other: 20 seconds for 126 steps. The operations here tell their shapes at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnxscript.function_libs.torch_lib.ops.core import aten_gru, aten_lstm
from torch import Tensor
from torch.overrides import TorchFunctionMode

_LAYERS = torch.library.Library("sqakd_fx_layers", "DEF")
_TAIL = (
    "Tensor[] params, bool has_biases, int num_layers, float dropout, bool train, bool bidirectional, "
    "bool batch_first"
)
_LAYERS.define(f"gru(Tensor input, Tensor hx, {_TAIL}) -> (Tensor, Tensor)")
_LAYERS.define(f"lstm(Tensor input, Tensor[] hx, {_TAIL}) -> (Tensor, Tensor, Tensor)")
_LAYERS.impl("gru", torch.gru, "CPU")
_LAYERS.impl("lstm", torch.lstm, "CPU")
_OPERATIONS: dict[Any, Any] = {
    torch.gru: torch.ops.sqakd_fx_layers.gru.default,
    torch.lstm: torch.ops.sqakd_fx_layers.lstm.default,
}


def _sequences(given: Tensor, state: Tensor, settings: Sequence[Any]) -> Tensor:
    """The outputs of all steps: `settings` end with `bidirectional` and `batch_first`."""
    directions = 2 if settings[-2] else 1
    return given.new_empty((*given.shape[:2], directions * state.shape[-1]))


@torch.library.register_fake("sqakd_fx_layers::gru", lib=_LAYERS)
def _(given: Tensor, hx: Tensor, params: Sequence[Tensor], *settings: Any) -> tuple[Tensor, Tensor]:
    return _sequences(given, hx, settings), torch.empty_like(hx)


@torch.library.register_fake("sqakd_fx_layers::lstm", lib=_LAYERS)
def _(
    given: Tensor, hx: Sequence[Tensor], params: Sequence[Tensor], *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _sequences(given, hx[0], settings), torch.empty_like(hx[0]), torch.empty_like(hx[1])


RECURRENT: dict[Any, Callable[..., Any]] = {
    torch.ops.sqakd_fx_layers.gru.default: aten_gru,
    torch.ops.sqakd_fx_layers.lstm.default: aten_lstm,
}
"""Their translations, for torch.onnx.export."""


class WholeLayers(TorchFunctionMode):
    """Inside, calls of torch.lstm and torch.gru on a batch are the operations here."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = _OPERATIONS.get(func)
        is_batch = own is not None and len(args) == 9 and isinstance(args[2], list | tuple)
        return own(*args) if is_batch else func(*args, **(kwargs or {}))
