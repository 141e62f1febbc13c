"""Weights in the standard small types, read by DequantizeLinear itself: for runtimes that want that.

    INT4 or INT2 initializer → DequantizeLinear → Conv

A channel whose sign BatchNorm flipped is stored unflipped, with a negative scale. Odd codes, of a grid
without zero, are stored as they are, in the narrowest type that holds them. ONNX Runtime on the CPU runs
INT4 in this form in float and refuses INT2: INT4 stands in for INT2 where the target refuses it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sqakd_fx.exporters.packed import (
    StoredWeight,
    pack_codes,
    raise_opset,
    replace_initializer,
    weights_of,
)
from sqakd_fx.runtime.capabilities import Support, support
from sqakd_fx.runtime.forms import INT2_DIRECT, stored_codes


def type_weights(
    model: ir.Model, provider: str | None = "CPUExecutionProvider", smallest: int = 2
) -> tuple[list[StoredWeight], list[str]]:
    """Type the weights of a container model in place; returns what is stored how, and notes.

    `provider` is the ONNX Runtime provider that must load the file, None for another runtime; no type has fewer bits
    than `smallest`.
    """
    widths = [bits for bits in (2, 4) if bits >= smallest]
    notes: list[str] = []
    if 2 in widths and provider is not None and support(INT2_DIRECT, provider) is Support.REFUSED:
        widths.remove(2)
        notes.append(
            "2-bit weights are stored as INT4: ONNX Runtime here refuses INT2 in this form"
        )
    report = []
    for value, readers in weights_of(model):
        assert value.const_value is not None
        codes = value.const_value.numpy()
        packing = pack_codes(codes, tuple(widths))
        if smallest <= 2 and 2 not in widths and pack_codes(codes, (2,)) is not None:
            notes = [
                "2-bit weights are stored as INT4: ONNX Runtime here refuses INT2 in this form"
            ]
        if packing is not None and (packing.b != 0).any():  # odd codes: a wider type holds them
            wide = [
                w for w in widths if codes.min() >= -(2 ** (w - 1)) and codes.max() < 2 ** (w - 1)
            ]
            packing = pack_codes(codes, (wide[0],)) if wide else None
        bits = 8 if packing is None else packing.bits
        report.append(StoredWeight(str(value.name), codes.size, bits, -(-codes.size * bits // 8)))
        if packing is None:
            continue
        replace_initializer(model, value, stored_codes(packing.stored, bits, value.name))
        for scale in dict.fromkeys(reader.inputs[1] for reader in readers):
            if scale is not None and scale.const_value is not None and (packing.a < 0).any():
                signed = scale.const_value.numpy() * packing.a.astype(np.float32)
                made = ir.tensor(signed.astype(np.float32), name=scale.name)
                replace_initializer(model, scale, made)
        for reader in readers:
            reader.resize_inputs(2)
    if any(weight.bits == 2 for weight in report):
        raise_opset(model)
    return report, notes
