"""The container profile with weights of few bits stored two or four to a byte.

    INT4 or INT2 initializer → Cast to INT8 → DequantizeLinear → Conv

ONNX Runtime folds the Cast when it loads the model, so the layer runs on the same integer kernel. Some codes
do not fit the small type as they are: those of a channel whose sign BatchNorm flipped, and the odd codes of a
grid without zero. They are stored as k with code = a · k + b, a and b integers per channel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from sqakd_fx.exporters.names import names_of
from sqakd_fx.ir.tensor_names import free_name
from sqakd_fx.runtime.capabilities import Support, support
from sqakd_fx.runtime.forms import INT2_CAST, INT4_CAST, OPSET_OF_INT2, stored_codes

_CAST_FORMS = {2: INT2_CAST, 4: INT4_CAST}
_IR_VERSION_OF_INT2 = 13


@dataclass(frozen=True)
class StoredWeight:
    """How one weight tensor lies in the file."""

    name: str
    elements: int
    bits: int
    size: int


@dataclass(frozen=True)
class Packing:
    """Codes as a · stored + b; `a` and `b` are int32 scalars, or vectors over the output channels."""

    bits: int
    stored: np.ndarray
    a: np.ndarray
    b: np.ndarray

    @property
    def is_plain(self) -> bool:
        return bool((self.a == 1).all() and (self.b == 0).all())


def pack_codes(codes: np.ndarray, widths: tuple[int, ...] = (2, 4)) -> Packing | None:
    """The narrowest packing of int8 codes of shape (channels, ...); None where no width holds them."""
    rows = codes.reshape(len(codes), -1).astype(np.int32)
    low, high = rows.min(axis=1), rows.max(axis=1)
    odd = (rows % 2 == 1).all(axis=1)
    for bits in sorted(widths):
        least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        plain = (low >= least) & (high <= most)
        flipped = (-high >= least) & (-low <= most)
        halved = odd & ((low - 1) // 2 >= least) & ((high - 1) // 2 <= most)
        if not (plain | flipped | halved).all():
            continue
        a = np.where(plain, 1, np.where(flipped, -1, 2))
        b = np.where(plain | flipped, 0, 1)
        stored = (rows - b[:, None]) // a[:, None]
        if (a == a[0]).all():
            a, b = a[0], b[0]
        return Packing(
            bits, stored.reshape(codes.shape), np.asarray(a, np.int32), np.asarray(b, np.int32)
        )
    return None


def weights_of(model: ir.Model) -> Iterator[tuple[ir.Value, list[ir.Node]]]:
    """Every initializer of int8 weight codes once, with all DequantizeLinear that read it, in order."""
    readers: dict[ir.Value, list[ir.Node]] = {}
    for node in model.graph:
        value = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if value is None or value.const_value is None or value.producer() is not None:
            continue
        if value.dtype == ir.DataType.INT8 and len(value.const_value.shape) > 1:
            readers.setdefault(value, []).append(node)
    yield from readers.items()


def stored_behind(codes: ir.Value) -> ir.Value:
    """The initializer behind the arithmetic of a packing; of codes that are computed, what computes them."""
    while (made := codes.producer()) is not None and made.op_type in ("Cast", "Mul", "Add"):
        source = made.inputs[0]
        assert source is not None
        codes = source
    return codes


def pack_weights(
    model: ir.Model, provider: str = "CPUExecutionProvider", smallest: int = 2
) -> tuple[list[StoredWeight], list[str]]:
    """Pack the weights of a container model in place; returns what is stored how, and notes.

    A width below `smallest` is not used, nor one that the installed ONNX Runtime does not run on integer kernels.
    """
    widths, notes = [], []
    for bits, form in _CAST_FORMS.items():
        if bits < smallest:
            notes.append(f"{bits}-bit storage is not used: the target does not know it")
            continue
        found = support(form, provider)
        if found is Support.INTEGER:
            widths.append(bits)
        else:
            notes.append(f"{bits}-bit storage is not used: here {form.name} {found.value}")
    report = []
    for value, readers in weights_of(model):
        assert value.const_value is not None
        codes = value.const_value.numpy()
        packing = pack_codes(codes, tuple(widths))
        bits = 8 if packing is None else packing.bits
        report.append(StoredWeight(str(value.name), codes.size, bits, -(-codes.size * bits // 8)))
        if packing is not None:
            _store(model, readers, value, packing)
    if any(weight.bits == 2 for weight in report):
        raise_opset(model)
    return report, notes


def raise_opset(model: ir.Model) -> None:
    """INT2 needs opset 25; nothing that these models use changed between 21 and 25."""
    model.opset_imports[""] = max(model.opset_imports[""], OPSET_OF_INT2)
    model.ir_version = max(model.ir_version, _IR_VERSION_OF_INT2)


def _store(model: ir.Model, readers: Sequence[ir.Node], value: ir.Value, packing: Packing) -> None:
    name = str(value.name)
    replace_initializer(model, value, stored_codes(packing.stored, packing.bits, name))
    made: list[ir.Node] = []

    def then(op_type: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        node = ir.node(op_type, list(inputs), attributes=attributes, name=f"{name}/{op_type}")
        node.outputs[0].name = f"{name}/{op_type}:0"
        made.append(node)
        return node.outputs[0]

    if packing.is_plain:
        codes = then("Cast", value, to=int(ir.DataType.INT8))
    else:
        wide = then("Cast", value, to=int(ir.DataType.INT32))
        axes = (1,) * (len(packing.stored.shape) - 1)
        for op_type, numbers in (("Mul", packing.a), ("Add", packing.b)):
            if op_type == "Add" and not numbers.any():
                continue
            shape = (-1, *axes) if numbers.ndim else ()
            constant = add_initializer(model, f"{name}_{op_type.lower()}", numbers.reshape(shape))
            wide = then(op_type, wide, constant)
        codes = then("Cast", wide, to=int(ir.DataType.INT8))
        made[-1].name = f"{name}/Cast_2"
        codes.name = f"{name}/Cast_2:0"
    model.graph.insert_before(readers[0], made)
    for reader in readers:
        reader.replace_input_with(0, codes)


def replace_initializer(model: ir.Model, value: ir.Value, tensor: ir.TensorProtocol) -> None:
    """Give an initializer another tensor of the same shape."""
    value.const_value = tensor
    value.type = ir.TensorType(tensor.dtype)


def add_initializer(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    """A new stored tensor, called `name` where nothing else is."""
    name = free_name(name, names_of(model))
    tensor = ir.tensor(array, name=name)
    value = ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    model.graph.register_initializer(value)
    return value
