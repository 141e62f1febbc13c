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


def _sequences(given: Tensor, state: Tensor, bidirectional: bool) -> Tensor:
    """The outputs of all steps."""
    directions = 2 if bidirectional else 1
    return given.new_empty((*given.shape[:2], directions * state.shape[-1]))


@torch.library.custom_op("sqakd_fx_layers::gru", mutates_args=())
def _gru(
    given: Tensor,
    state: Tensor,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor]:
    settings = (has_biases, num_layers, dropout, train, bidirectional, batch_first)
    return torch.gru(given, state, list(params), *settings)


@_gru.register_fake
def _(given, state, params, has_biases, num_layers, dropout, train, bidirectional, batch_first):  # type: ignore[no-untyped-def]
    return _sequences(given, state, bidirectional), torch.empty_like(state)


@torch.library.custom_op("sqakd_fx_layers::lstm", mutates_args=())
def _lstm(
    given: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    settings = (has_biases, num_layers, dropout, train, bidirectional, batch_first)
    return torch.lstm(given, list(states), list(params), *settings)


@_lstm.register_fake
def _(given, states, params, has_biases, num_layers, dropout, train, bidirectional, batch_first):  # type: ignore[no-untyped-def]
    hidden, cells = states
    sequences = _sequences(given, hidden, bidirectional)
    return sequences, torch.empty_like(hidden), torch.empty_like(cells)


_OPERATIONS: dict[Any, Any] = {
    torch.gru: torch.ops.sqakd_fx_layers.gru.default,
    torch.lstm: torch.ops.sqakd_fx_layers.lstm.default,
}
RECURRENT: dict[Any, Callable[..., Any]] = {
    torch.ops.sqakd_fx_layers.gru.default: aten_gru,
    torch.ops.sqakd_fx_layers.lstm.default: aten_lstm,
}
"""Their translations, for torch.onnx.export."""


class WholeLayers(TorchFunctionMode):
    """Inside, calls of torch.lstm and torch.gru on a batch are the operations here."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = _OPERATIONS.get(func)
        if own is None or len(args) != 9 or not isinstance(args[2], list | tuple):
            return func(*args, **(kwargs or {}))
        return own(*args)
