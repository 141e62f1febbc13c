"""What this package writes on the nodes of a graph: one pair of functions for each key of `node.meta`.

    key                 type                    written by              read by
    module_path         str                     front ends, passes      everywhere: names, reports, overrides
    is_module           bool                    symbolic, canonicalize  names of tensors, sensitivity
    constant            int, float or dtype     frontend.verify         fold_constants
    is_batch_size       bool                    frontend.verify         fold_constants
    batch_axes          tuple[int, ...]         frontend.verify         fold_constants, decompose, lower_to_integer
    free_axes           tuple[int, ...]         propagate_shapes        decompose, lower_to_integer
    layer               LayerSettings           insert_quantizers       lower_to_integer, program, explain
    arithmetic          Kind                    insert_quantizers       lower_to_integer, training.features, explain
    weight_only         LayerSettings           insert_quantizers       lower_to_integer
    table               bool                    insert_quantizers       lower_to_integer, explain
    recurrent           bool                    insert_quantizers       lower_to_integer
    affine              bool                    insert_quantizers       explain
    input_quantizers    dict[str, nn.Module]    insert_quantizers       insert_quantizers, program
    output_names        tuple[str, ...]         frontend.trace          output_kinds, exporters, validation
    quantized_tensor    QuantizedTensor         lower_to_integer        exporters, validation, inspect
    quantizer_node      str                     lower_to_integer        validation
    source              str                     lower_to_integer        inspect

Keys of torch's own (tensor_meta, stack_trace, from_node, nn_module_stack) are not described here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import fx, nn

from sqakd_fx.ir.op_table import Kind
from sqakd_fx.ir.quantized_tensors import QuantizedTensor
from sqakd_fx.recipe.keys import WeightRange

Constant = int | float | torch.dtype
_Module = TypeVar("_Module", bound=nn.Module)


@dataclass(frozen=True)
class LayerSettings:
    """Resolved settings of one compute node; `source` says which rule gave the bits."""

    weight_bits: int
    activation_bits: int
    weight_family: str
    activation_family: str
    granularity: Literal["channel", "tensor"]
    weight_range: WeightRange
    float_reason: str | None
    source: str
    float_activations: bool = False


# -- where a node came from ----------------------------------------------------------------


def module_path(node: fx.Node) -> str:
    """The user's module that a node came from, the empty string for the root."""
    return str(node.meta.get("module_path") or "")


def set_module_path(node: fx.Node, path: str) -> None:
    node.meta["module_path"] = path


def keep_only_module_path(node: fx.Node, like: fx.Node) -> None:
    """Forget what is known of a node but for the user's module, which is that of `like`."""
    node.meta = {"module_path": module_path(like)}


def keep_origin(node: fx.Node, like: fx.Node) -> None:
    """Forget what is known of a node but for the module and the line that `like` came from."""
    node.meta = {k: like.meta[k] for k in ("module_path", "stack_trace") if k in like.meta}


def is_module(node: fx.Node) -> bool:
    """Whether the node is the whole of the user's module at its path."""
    return bool(node.meta.get("is_module"))


def own_name(node: fx.Node) -> str:
    """What an exact override of a recipe calls a node: the module's path where it is the whole of one."""
    return module_path(node) if is_module(node) else node.name


def set_is_module(node: fx.Node, whole: bool) -> None:
    node.meta["is_module"] = whole


def accumulator_source(node: fx.Node) -> str | None:
    """The path of the layer whose int32 accumulator a node makes."""
    path: str | None = node.meta.get("source")
    return path


def set_accumulator_source(node: fx.Node, path: str) -> None:
    node.meta["source"] = path


def output_names(end: fx.Node) -> tuple[str, ...]:
    """What the tensors are called that a graph returns at its output node; none where nothing is known."""
    names: tuple[str, ...] = end.meta.get("output_names", ())
    return names


def set_output_names(end: fx.Node, names: tuple[str, ...]) -> None:
    end.meta["output_names"] = names


def output_parts(end: fx.Node) -> Mapping[int, tuple[int, ...]]:
    """Sizes of the unlike parts of tensors that a graph returns at its output node, by number of the tensor."""
    parts: Mapping[int, tuple[int, ...]] = end.meta.get("output_parts", {})
    return parts


def set_output_parts(end: fx.Node, parts: Mapping[int, tuple[int, ...]]) -> None:
    end.meta["output_parts"] = parts


# -- what two batches showed ---------------------------------------------------------------


def constant(node: fx.Node) -> Constant | None:
    """The number that a node gives for every batch."""
    value: Constant | None = node.meta.get("constant")
    return value


def set_constant(node: fx.Node, value: Constant) -> None:
    node.meta["constant"] = value


def is_batch_size(node: fx.Node) -> bool:
    """Whether a node gives the number of samples."""
    return bool(node.meta.get("is_batch_size"))


def set_is_batch_size(node: fx.Node) -> None:
    node.meta["is_batch_size"] = True


def batch_axes(node: fx.Node) -> tuple[int, ...]:
    """The axes of a tensor that grow with the batch; none where that is not known."""
    return tuple(node.meta.get("batch_axes") or ())


def set_batch_axes(node: fx.Node, axes: tuple[int, ...]) -> None:
    node.meta["batch_axes"] = axes


def free_axes(node: fx.Node) -> tuple[int, ...]:
    """The axes of a tensor whose sizes the recipe leaves open, or that follow from them."""
    return tuple(node.meta.get("free_axes") or ())


def set_free_axes(node: fx.Node, axes: tuple[int, ...]) -> None:
    node.meta["free_axes"] = axes


# -- what becomes integer ------------------------------------------------------------------


def layer(node: fx.Node) -> LayerSettings | None:
    """The settings of a layer that becomes integer."""
    settings: LayerSettings | None = node.meta.get("layer")
    return settings


def set_layer(node: fx.Node, settings: LayerSettings) -> None:
    node.meta["layer"] = settings


def weight_only(node: fx.Node) -> LayerSettings | None:
    """The settings of a layer in float whose weight is stored in codes."""
    settings: LayerSettings | None = node.meta.get("weight_only")
    return settings


def has_quantized_weight(node: fx.Node) -> bool:
    """Whether a layer's weight is on a grid, whatever its input is."""
    return layer(node) is not None or weight_only(node) is not None


def set_weight_only(node: fx.Node, settings: LayerSettings) -> None:
    node.meta["weight_only"] = settings


def is_table(node: fx.Node) -> bool:
    """Whether a node looks rows of codes up."""
    return bool(node.meta.get("table"))


def set_table(node: fx.Node) -> None:
    node.meta["table"] = True


def is_recurrent(node: fx.Node) -> bool:
    """Whether a node is a recurrent layer whose weights are stored in codes."""
    return bool(node.meta.get("recurrent"))


def set_recurrent(node: fx.Node) -> None:
    node.meta["recurrent"] = True


def arithmetic(node: fx.Node) -> Kind | None:
    """The kind of a sum, product or average that becomes integer."""
    kind: Kind | None = node.meta.get("arithmetic")
    return kind


def set_arithmetic(node: fx.Node, kind: Kind) -> None:
    node.meta["arithmetic"] = kind


def is_affine(node: fx.Node) -> bool:
    """Whether a node is an affine of each channel that becomes integer on its own."""
    return bool(node.meta.get("affine"))


def set_affine(node: fx.Node) -> None:
    node.meta["affine"] = True


def is_integer(node: fx.Node) -> bool:
    """Whether the integer program computes a node on codes."""
    known = layer(node) is not None or arithmetic(node) is not None
    return known or is_affine(node) or is_table(node)


def input_quantizers(node: fx.Node, kind: type[_Module]) -> dict[str, _Module]:
    """The quantizers, of class `kind`, of the tensors that a node reads, by the names of those tensors."""
    known = node.meta.get("input_quantizers", {})
    return {name: module for name, module in known.items() if isinstance(module, kind)}


def set_input_quantizer(node: fx.Node, tensor: str, quantizer: nn.Module) -> None:
    node.meta.setdefault("input_quantizers", {})[tensor] = quantizer


# -- the integer program -------------------------------------------------------------------


def quantized_tensor(node: fx.Node) -> QuantizedTensor | None:
    """What is known of the codes that a node gives."""
    found: QuantizedTensor | None = node.meta.get("quantized_tensor")
    return found


def set_quantized_tensor(node: fx.Node, tensor: QuantizedTensor) -> None:
    node.meta["quantized_tensor"] = tensor


def quantizer_node(node: fx.Node) -> str | None:
    """The name of the trained graph's node that quantizes to the same codes."""
    name: str | None = node.meta.get("quantizer_node")
    return name


def set_quantizer_node(node: fx.Node, name: str) -> None:
    node.meta["quantizer_node"] = name
