"""LSTM, GRU and RNN layers as one operation each while a graph is exported, and as one operator in the file.

torch.export finds the shapes of their results by running every time step on tensors without values, one operation
of Python after the other: 20 seconds for 126 steps. The operations here tell their shapes at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset21 as op
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sqakd_fx.exporters.symbolic import Value

_NAMESPACE = "sqakd_fx_layers"
_STATES = ("initial_h", "initial_c")
_FIRST_STATE = 5
_KEEP_VALUES = {"Slice", "Expand", "Reshape", "Transpose", "Unsqueeze", "Squeeze", "Identity"}


def _sequences(given: Tensor, state: Tensor, bidirectional: bool) -> Tensor:
    """The outputs of all steps."""
    directions = 2 if bidirectional else 1
    return given.new_empty((*given.shape[:2], directions * state.shape[-1]))


def _operation(name: str, run: Callable[..., Any], states: str) -> Any:
    """The operation of a layer; `states` is the schema's type of its first states."""
    results = "Tensor, Tensor, Tensor" if states == "Tensor[]" else "Tensor, Tensor"
    settings = (
        "bool biases, int layers, float dropout, bool train, bool bidirectional, bool batch_first"
    )
    schema = f"(Tensor given, {states} states, Tensor[] params, {settings}) -> ({results})"

    def layer(given: Tensor, begun: Any, params: Sequence[Tensor], *rest: Any) -> Any:
        return run(given, begun, list(params), *rest)

    def shapes(given: Tensor, begun: Any, params: Any, *rest: Any) -> tuple[Tensor, ...]:
        each = [begun] if isinstance(begun, Tensor) else begun
        bidirectional = rest[-2]
        return _sequences(given, each[0], bidirectional), *map(torch.empty_like, each)

    made = torch.library.custom_op(f"{_NAMESPACE}::{name}", layer, mutates_args=(), schema=schema)
    made.register_fake(shapes)
    return getattr(getattr(torch.ops, _NAMESPACE), name).default


_GRU = _operation("gru", torch.gru, "Tensor")
_LSTM = _operation("lstm", torch.lstm, "Tensor[]")
_RNN_TANH = _operation("rnn_tanh", torch.rnn_tanh, "Tensor")
_RNN_RELU = _operation("rnn_relu", torch.rnn_relu, "Tensor")
_OPERATIONS: dict[Any, Any] = {
    torch.gru: _GRU,
    torch.lstm: _LSTM,
    torch.rnn_tanh: _RNN_TANH,
    torch.rnn_relu: _RNN_RELU,
}


class WholeLayers(TorchFunctionMode):
    """Inside, calls of recurrent layers on a batch are the operations here."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = _OPERATIONS.get(func)
        if own is None or len(args) != 9 or not isinstance(args[2], list | tuple):
            return func(*args, **(kwargs or {}))
        return own(*args)


@dataclass(frozen=True)
class _Operator:
    """ONNX's operator for a layer.

    Attributes:
        call: it.
        gates: torch's number of each of its gates, in its order.
        activation: what it computes, where that is not the default.
        resets_product: torch's GRU resets the product with the state, not the state.
    """

    call: Callable[..., Any]
    gates: tuple[int, ...]
    activation: str | None = None
    resets_product: bool = False

    def ordered(self, rows: Value, hidden: int, more: Sequence[int]) -> Value:
        """The rows of a weight or a bias as ONNX has them, behind an axis for the directions."""
        count = len(self.gates)
        if count > 1:
            rows = op.Gather(op.Reshape(rows, [count, hidden, *more]), [*self.gates], axis=0)
        return op.Reshape(rows, [1, count * hidden, *more])

    def settings(self, directions: int) -> dict[str, Any]:
        found: dict[str, Any] = {} if directions == 1 else {"direction": "bidirectional"}
        if self.activation:
            found["activations"] = [self.activation] * directions
        return found | ({"linear_before_reset": 1} if self.resets_product else {})


def _joined(values: Sequence[Value], axis: int = 0) -> Value:
    return values[0] if len(values) == 1 else op.Concat(*values, axis=axis)


def _translation(operator: _Operator) -> Callable[..., Any]:
    """What writes a layer; a state of zeros is absent in ONNX, see `drop_zero_states`."""

    def translate(  # type: ignore[no-untyped-def]
        given, states, params, has_biases, num_layers, dropout, train, bidirectional, batch_first
    ):
        directions = 2 if bidirectional else 1
        of_each = 4 if has_biases else 2
        begun = list(states) if isinstance(states, Sequence) else [states]
        hidden = begun[0].shape[2]
        settings = operator.settings(directions) | {"hidden_size": hidden}
        y = op.Transpose(given, perm=[1, 0, 2]) if batch_first else given
        ended = []
        for first in range(0, num_layers * directions, directions):
            sets = [
                [
                    operator.ordered(rows, hidden, [-1] if i < 2 else [])
                    for i, rows in enumerate(params[at * of_each : (at + 1) * of_each])
                ]
                for at in range(first, first + directions)
            ]
            read = [_joined([one[i] for one in sets]) for i in (0, 1)]
            if has_biases:
                read.append(_joined([_joined(one[2:], axis=1) for one in sets]))
            of_layer = (
                begun
                if num_layers == 1
                else [op.Slice(state, [first], [first + directions], [0]) for state in begun]
            )
            named = dict(zip(_STATES, of_layer, strict=False))
            y, *last = operator.call(y, *read, **named, **settings)
            ended.append(last)
            if directions == 1:
                y = op.Squeeze(y, [1])
            else:  # (steps, directions, batch, hidden)
                y = op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), [0, 0, -1])
        if batch_first:
            y = op.Transpose(y, perm=[1, 0, 2])
        return y, *(_joined(of_state) for of_state in zip(*ended, strict=True))

    return translate


RECURRENT: dict[Any, Callable[..., Any]] = {
    _LSTM: _translation(_Operator(op.LSTM, (0, 3, 1, 2))),
    _GRU: _translation(_Operator(op.GRU, (1, 0, 2), resets_product=True)),
    _RNN_TANH: _translation(_Operator(op.RNN, (0,))),
    _RNN_RELU: _translation(_Operator(op.RNN, (0,), "Relu")),
}
"""Their translations, for torch.onnx.export."""


def drop_zero_states(model: ir.Model) -> None:
    """Leave out the first states of recurrent layers where they are zero, which is ONNX's default."""
    for node in model.graph:
        if node.op_type not in ("LSTM", "GRU", "RNN"):
            continue
        for index in range(_FIRST_STATE, len(node.inputs)):
            if _is_zero(node.inputs[index]):
                node.replace_input_with(index, None)
        given = [index for index, value in enumerate(node.inputs) if value is not None]
        node.resize_inputs(given[-1] + 1)


def _is_zero(value: ir.Value | None) -> bool:
    if value is None:
        return False
    if value.const_value is not None:
        return not value.const_value.numpy().any()
    made = value.producer()
    if made is not None and made.op_type == "ConstantOfShape":
        number = made.attributes.get("value")
        return number is None or not number.as_tensor().numpy().any()
    return made is not None and made.op_type in _KEEP_VALUES and _is_zero(made.inputs[0])
