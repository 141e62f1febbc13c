"""torch's table of ONNX translations is built once, and every export has one of its own."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch.onnx._internal.exporter._registration import ONNXRegistry

from sqakd_fx.exporters.kept_translations import kept_translations


def contents(table: Any) -> dict[Any, list[Any]]:
    return {name: [one.onnx_function for one in found] for name, found in table.functions.items()}


def test_a_copy_is_what_torch_builds_whatever_was_added_to_another() -> None:
    built = contents(ONNXRegistry.from_torchlib(opset_version=21))
    with kept_translations():
        first = ONNXRegistry.from_torchlib(opset_version=21)
        first.register_op(torch.ops.aten.relu.default, lambda x: x)
        second = ONNXRegistry.from_torchlib(opset_version=21)
    assert list(contents(second)) == list(built)
    assert len(contents(first)["aten::relu"]) == len(built["aten::relu"]) + 1
    assert len(contents(second)["aten::relu"]) == len(built["aten::relu"])
    assert second.opset_version == 21


def test_operations_of_a_library_that_is_imported_later_are_in_it() -> None:
    with kept_translations():
        ONNXRegistry.from_torchlib(opset_version=21)
        importlib.import_module("torch.ao.quantization.fx._decomposed")
        later = ONNXRegistry.from_torchlib(opset_version=21)
    assert "quantized_decomposed::quantize_per_tensor" in contents(later)


def test_torch_is_left_as_it_was() -> None:
    before = ONNXRegistry.__dict__["from_torchlib"]
    with kept_translations():
        assert ONNXRegistry.__dict__["from_torchlib"] is not before
    assert ONNXRegistry.__dict__["from_torchlib"] is before
