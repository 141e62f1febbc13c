"""Brevitas, with the same quantized tensors as ours as far as its graph flow goes.

Weights are narrow and per channel, activations per tensor. At 8 bits the scales of weights are statistics,
Brevitas' default; below, they are learned from an MSE-optimal start (its closest to LSQ). Scales of
activations are learned from a percentile of the calibration data, its default. BatchNorm stays live. First
and last layer, and every tensor that is added, have 8 bits. Transformers go through the layer-wise flow, since
the graph flow refuses their residual sums: there, sums and products of activations stay in float.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from brevitas import nn as qnn
from brevitas.graph.calibrate import calibration_mode
from brevitas.graph.quantize import (
    QUANT_IDENTITY_MAP,
    layerwise_quantize,
    preprocess_for_quantize,
    quantize,
)
from brevitas.quant import (
    Int8ActPerTensorFloat,
    Int8WeightPerChannelFloat,
    Int8WeightPerChannelFloatMSE,
    Int32Bias,
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
    quantized = _quantized(copy.deepcopy(model), bits, None).to(example.device)
    return _calibrated(quantized, calibration).train()


def frozen(model: nn.Module) -> nn.Module:
    return model.eval()


def export(model: nn.Module, images: Tensor, float_file: str, into: str) -> None:
    """QuantizeLinear, Clip, DequantizeLinear, by torch's older exporter, as Brevitas does by default.

    BatchNorm is folded and biases are int32, so that a runtime can use its integer kernels.
    """
    from brevitas.export import export_onnx_qcdq

    copied = copy.deepcopy(model).eval()
    folded = copied if _is_transformer(model) else preprocess_for_quantize(copied, merge_bn=True)
    quantized = _calibrated(_quantized(folded, 8, Int32Bias), [images])
    export_onnx_qcdq(
        quantized,
        args=images,
        export_path=into,
        input_names=["x"],
        output_names=["y"],
        dynamic_axes={"x": {0: "batch"}},
        dynamo=False,
    )


def _is_transformer(model: nn.Module) -> bool:
    return any(isinstance(m, nn.LayerNorm) for m in model.modules())


def _quantized(model: nn.Module, bits: int, bias: type | None) -> nn.Module:
    way = _by_layers if _is_transformer(model) else _by_graph
    return way(model, bits, bias).eval()


def _calibrated(quantized: nn.Module, calibration: Sequence[Tensor]) -> nn.Module:
    with torch.no_grad(), calibration_mode(quantized):
        for batch in calibration:
            quantized(batch)
    return quantized


def _narrowed(quantizer: type, bits: int) -> type:
    return type(quantizer.__name__, (quantizer,), {"bit_width": bits})


def _weight(bits: int) -> type:
    return Int8WeightPerChannelFloat if bits == 8 else _narrowed(Int8WeightPerChannelFloatMSE, bits)


def _edges(layers: Sequence[nn.Module | None]) -> set[int]:
    return {id(layers[0]), id(layers[-1])}


def _by_layers(model: nn.Module, bits: int, bias: type | None) -> nn.Module:
    edges = _edges([m for m in model.modules() if isinstance(m, LAYERS)])
    weight, signed = _weight(bits), _narrowed(Int8ActPerTensorFloat, bits)
    layer: dict[str, Any] = {
        "weight_quant": lambda m: Int8WeightPerChannelFloat if id(m) in edges else weight,
        "input_quant": lambda m: Int8ActPerTensorFloat if id(m) in edges else signed,
        "bias_quant": bias,
        "return_quant_tensor": False,
    }
    return layerwise_quantize(  # type: ignore[no-any-return]
        model, {nn.Conv2d: (qnn.QuantConv2d, layer), nn.Linear: (qnn.QuantLinear, layer)}
    )


def _by_graph(model: nn.Module, bits: int, bias: type | None) -> nn.Module:
    graph = preprocess_for_quantize(model, merge_bn=False)
    modules = dict(graph.named_modules())

    def module_of(node: fx.Node) -> nn.Module | None:
        return modules[str(node.target)] if node.op == "call_module" else None

    layers = [node for node in graph.graph.nodes if isinstance(module_of(node), LAYERS)]
    edges = _edges([module_of(node) for node in layers])
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
        if bits < 8
        and id(module_of(node)) not in edges
        and not isinstance(module_of(node.all_input_nodes[0]), NarrowReLU)
    }
    unsigned = {
        id(module_of(node))
        for node in layers
        if isinstance(module_of(node.all_input_nodes[0]), nn.ReLU)
    }
    weight, activation = _weight(bits), _narrowed(Uint8ActPerTensorFloat, bits)
    signed = _narrowed(Int8ActPerTensorFloat, bits)
    layer: dict[str, Any] = {
        "weight_quant": lambda m: Int8WeightPerChannelFloat if id(m) in edges else weight,
        "input_quant": lambda m: (
            None if id(m) not in requantized else activation if id(m) in unsigned else signed
        ),
        "bias_quant": bias,
        "return_quant_tensor": False,
    }
    # behind an average pool there is no scale that an int32 bias could be made of
    linear = layer if bias is None else layer | {"input_quant": Int8ActPerTensorFloat}
    wide = {"act_quant": Uint8ActPerTensorFloat, "return_quant_tensor": True}
    narrow = {"act_quant": activation, "return_quant_tensor": True}
    return quantize(  # type: ignore[no-any-return]
        graph,
        quant_identity_map=QUANT_IDENTITY_MAP,
        compute_layer_map={
            nn.Conv2d: (qnn.QuantConv2d, layer),
            nn.Linear: (qnn.QuantLinear, linear),
        },
        quant_act_map={nn.ReLU: (qnn.QuantReLU, wide), NarrowReLU: (qnn.QuantReLU, narrow)},
        unsigned_act_tuple=(nn.ReLU, NarrowReLU),
        requantize_layer_handler_output=False,
    )
