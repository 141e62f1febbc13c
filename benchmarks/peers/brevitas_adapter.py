"""Brevitas: its FX flow, with the same quantized tensors as ours.

Weights are narrow and per channel, activations per tensor. At 8 bits the scales of weights are statistics,
Brevitas' default; below, they are learned from an MSE-optimal start (its closest to LSQ). Scales of
activations are learned from a percentile of the calibration data, its default. BatchNorm stays live. First
and last layer, and every tensor that is added, have 8 bits.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from brevitas import nn as qnn
from brevitas.graph.calibrate import calibration_mode
from brevitas.graph.quantize import QUANT_IDENTITY_MAP, preprocess_for_quantize, quantize
from brevitas.quant import (
    Int8WeightPerChannelFloat,
    Int8WeightPerChannelFloatMSE,
    Uint8ActPerTensorFloat,
)
from torch import Tensor, fx, nn

LAYERS = (nn.Conv2d, nn.Linear)


class NarrowReLU(nn.ReLU):
    """A ReLU whose output only layers read, none of them the last: it gets the layers' bits."""


def prepare(
    model: nn.Module, example: Tensor, bits: int, calibration: Sequence[Tensor]
) -> nn.Module:
    """A trainable simulation of `model` at `bits` bits, calibrated on batches of images."""
    graph = preprocess_for_quantize(copy.deepcopy(model), merge_bn=False)
    modules = dict(graph.named_modules())

    def module_of(node: fx.Node) -> nn.Module | None:
        return modules[str(node.target)] if node.op == "call_module" else None

    layers = [node for node in graph.graph.nodes if isinstance(module_of(node), LAYERS)]
    edges = {id(module_of(layers[0])), id(module_of(layers[-1]))}
    for node in graph.graph.nodes:
        readers = [module_of(user) for user in node.users]
        if isinstance(module_of(node), nn.ReLU) and all(
            isinstance(m, LAYERS) and id(m) not in edges for m in readers
        ):
            graph.set_submodule(str(node.target), NarrowReLU())
            modules[str(node.target)] = graph.get_submodule(str(node.target))
    requantized = {
        id(module_of(node))
        for node in layers
        if id(module_of(node)) not in edges
        and not isinstance(module_of(node.all_input_nodes[0]), NarrowReLU)
    }

    class Weight(Int8WeightPerChannelFloatMSE):  # type: ignore[misc]
        bit_width = bits

    class Activation(Uint8ActPerTensorFloat):  # type: ignore[misc]
        bit_width = bits

    low = bits < 8
    layer = {
        "weight_quant": lambda m: (
            Weight if low and id(m) not in edges else Int8WeightPerChannelFloat
        ),
        "input_quant": lambda m: Activation if low and id(m) in requantized else None,
        "bias_quant": None,
        "return_quant_tensor": False,
    }
    wide = {"act_quant": Uint8ActPerTensorFloat, "return_quant_tensor": True}
    narrow = {"act_quant": Activation, "return_quant_tensor": True}
    graph = quantize(
        graph,
        quant_identity_map=QUANT_IDENTITY_MAP,
        compute_layer_map={
            nn.Conv2d: (qnn.QuantConv2d, layer),
            nn.Linear: (qnn.QuantLinear, layer),
        },
        quant_act_map={nn.ReLU: (qnn.QuantReLU, wide), NarrowReLU: (qnn.QuantReLU, narrow)},
        unsigned_act_tuple=(nn.ReLU, NarrowReLU),
        requantize_layer_handler_output=False,
    )
    graph.eval()
    with torch.no_grad(), calibration_mode(graph):
        for batch in calibration:
            graph(batch)
    return graph.train()


def frozen(model: nn.Module) -> nn.Module:
    return model.eval()
