"""A recurrent layer as a function of its parameters, so that quantizers can stand in front of its weights.

Before:  y, (h, c) = self.lstm(x, (h0, c0))
After:   y, h, c = torch.lstm(x, (h0, c0), [W_ih, W_hh, b_ih, b_hh, ...], ...)
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from sqakd_fx.ir import meta
from sqakd_fx.ir.rewriting import read_attribute

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "LSTM": torch.lstm,
    "GRU": torch.gru,
    "RNN_TANH": torch.rnn_tanh,
    "RNN_RELU": torch.rnn_relu,
}
"""By the `mode` of the module."""


def as_function(graph_module: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Replace the call of an `nn.LSTM`, `nn.GRU` or `nn.RNN` on a batch; returns the new node."""
    path = str(node.target)
    module = graph_module.get_submodule(path)
    assert isinstance(module, nn.RNNBase)
    given = dict(zip(("input", "hx"), node.args)) | node.kwargs
    sequences, state = given["input"], given.get("hx")
    assert isinstance(sequences, fx.Node)
    graph = graph_module.graph
    with graph.inserting_before(node):
        parameters = [
            read_attribute(graph_module, f"{path}.{name}") for name in module._flat_weights_names
        ]
        if state is None:
            state = _zeros(graph, sequences, module)
        called = graph.call_function(
            _FUNCTIONS[module.mode],
            (
                sequences,
                state,
                parameters,
                module.bias,
                module.num_layers,
                0.0,
                False,
                module.bidirectional,
                module.batch_first,
            ),
        )
    called.meta = dict(node.meta)
    meta.set_module_path(called, path)
    if module.mode == "LSTM":
        _take_states_out(node, called)
    node.replace_all_uses_with(called)
    graph.erase_node(node)
    return called


def _zeros(graph: fx.Graph, sequences: fx.Node, module: nn.RNNBase) -> Any:
    """The state that a module begins with, for a batch of any size."""
    batch = graph.call_method("size", (sequences, 0 if module.batch_first else 1))
    count = module.num_layers * (2 if module.bidirectional else 1)
    zeros = graph.call_method("new_zeros", (sequences, (count, batch, module.hidden_size)))
    return (zeros, zeros) if module.mode == "LSTM" else zeros


def _take_states_out(node: fx.Node, called: fx.Node) -> None:
    """The module gives (y, (h, c)) and the function (y, h, c): every reader of the states gets its own."""
    graph = node.graph
    for user in list(node.users):
        if user.target is not operator.getitem:
            _replace_in(user, node, _nested(_pieces(graph, called, user)))
        elif user.args[1] in (0, -2):
            user.args = (node, 0)
        else:
            with graph.inserting_before(user):
                states = [graph.call_function(operator.getitem, (called, i)) for i in (1, 2)]
            known = user.meta.get("tensor_meta")
            for index, state in enumerate(states):
                state.meta = dict(user.meta)
                state.meta["tensor_meta"] = known[index] if known else None
            _hand_out(user, states)


def _hand_out(pair: fx.Node, states: list[fx.Node]) -> None:
    for reader in list(pair.users):
        if reader.target is operator.getitem and isinstance(reader.args[1], int):
            reader.replace_all_uses_with(states[reader.args[1]])
            reader.graph.erase_node(reader)
        else:
            _replace_in(reader, pair, tuple(states))
    pair.graph.erase_node(pair)


def _replace_in(reader: fx.Node, old: fx.Node, new: Any) -> None:
    """A tuple of nodes for a node among the arguments of another."""
    reader.args = fx.map_arg(reader.args, lambda x: new if x is old else x)
    reader.kwargs = fx.map_arg(reader.kwargs, lambda x: new if x is old else x)


def _pieces(graph: fx.Graph, called: fx.Node, before: fx.Node) -> list[fx.Node]:
    with graph.inserting_before(before):
        return [graph.call_function(operator.getitem, (called, index)) for index in range(3)]


def _nested(pieces: list[fx.Node]) -> Any:
    sequences, *states = pieces
    return sequences, tuple(states)
