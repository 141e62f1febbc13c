"""What torch's exporter writes, said once and no longer than needed: types, defaults, constants, what nothing reads."""

from __future__ import annotations

from collections.abc import Set

import onnx
import onnx_ir as ir
from onnx_ir.passes import common as ir_passes
from onnxscript import optimizer
from onnxscript.rewriter import RewriteRuleSet
from onnxscript.rewriter.rules.common import mul_by_1_rule

from sqakd_fx.exporters.names import names_of
from sqakd_fx.exporters.recurrent import drop_zero_states
from sqakd_fx.ir.tensor_names import free_name

_LARGEST_SHARED_CONSTANT = 1 << 16
_READ_AS_ABSENT = {("STFT", "onesided")}
"""Attributes whose default ONNX's shape inference does not know."""


def simplify(model: ir.Model, codes: Set[str]) -> None:
    """Simplify a translated model in place, with types from ONNX's inference; initializers called `codes` stay."""
    stored = set(model.graph.initializers)
    ir_passes.ClearMetadataAndDocStringPass()(model)
    shapes = [value.shape and value.shape.copy() for value in model.graph.outputs]
    _forget_types(model)
    _drop_defaults(model)
    ir_passes.ShapeInferencePass()(model)
    _fold_constants(model, codes)
    drop_zero_states(model)
    _lift_constants(model, stored)
    ir_passes.IdentityEliminationPass()(model)
    ir_passes.RemoveUnusedNodesPass()(model)
    for value, shape in zip(model.graph.outputs, shapes, strict=True):
        # inference has new symbols for sizes that pass a Reshape
        value.shape = shape or value.shape


def _forget_types(model: ir.Model) -> None:
    """Types come from ONNX shape inference: the exporter's own describe integer accumulators."""
    outputs = set(model.graph.outputs)
    for value in model.graph.initializers.values():
        value.metadata_props.clear()
    for node in model.graph:
        for value in node.outputs:
            value.metadata_props.clear()
            if value not in outputs:
                value.type = None
                value.shape = None


def _drop_defaults(model: ir.Model) -> None:
    """Attributes that say what the operator does anyway."""
    version = model.opset_imports[""]
    for node in model.graph:
        if node.domain:
            continue
        schema = onnx.defs.get_schema(node.op_type, version, "")
        for name, attribute in list(node.attributes.items()):
            if (node.op_type, name) in _READ_AS_ABSENT:
                continue
            declared = schema.attributes.get(name)
            usual = None if declared is None else declared.default_value
            if (
                usual is not None
                and usual.name
                and onnx.helper.get_attribute_value(usual)
                == (
                    attribute.value.encode()
                    if isinstance(attribute.value, str)
                    else attribute.value
                )
            ):
                del node.attributes[name]
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale = node.inputs[1]
            if scale is not None and scale.shape is not None and len(scale.shape) == 0:
                node.attributes.pop("axis", None)


def _fold_constants(model: ir.Model, codes: Set[str]) -> None:
    """Compute now what no input changes, but for what reads the initializers called `codes`."""

    def quantizing(node: ir.Node) -> bool | None:
        quantizes = node.op_type in ("QuantizeLinear", "DequantizeLinear")
        return False if quantizes or any(x and x.name in codes for x in node.inputs) else None

    optimizer.fold_constants(model, should_fold=quantizing)
    RewriteRuleSet(mul_by_1_rule.commute()).apply_to_model(model)


def _lift_constants(model: ir.Model, stored: Set[str]) -> None:
    """Constants become initializers, one for each value; tensors `stored` inside a module keep their names."""
    ir_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    seen: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
    for name, value in list(model.graph.initializers.items()):
        if name in stored and "." in name:
            continue
        tensor = value.const_value
        if tensor is None or tensor.size > _LARGEST_SHARED_CONSTANT:
            continue
        array = tensor.numpy()
        key = (str(array.dtype), tuple(array.shape), array.tobytes())
        first = seen.setdefault(key, value)
        if first is not value:
            ir.convenience.replace_all_uses_with(value, first)
            del model.graph.initializers[name]
    for value in seen.values():
        del model.graph.initializers[str(value.name)]
    taken = names_of(model)
    for number, value in enumerate(seen.values()):
        value.name = free_name(f"constant.{number}", taken)
        taken.add(value.name)
        model.graph.initializers[value.name] = value
