"""ONNX Runtime on an emulated x86 processor that has AVX2 and no 8-bit dot products (QEMU in user mode)."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

EMULATOR = shutil.which("qemu-x86_64")
"""Of Debian's package qemu-user, 7.2 or later; None where it is not installed."""
_RUN = """
import sys, numpy as np, onnxruntime
model, inputs, outputs = sys.argv[1:]
session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
np.savez(outputs, *session.run(None, dict(np.load(inputs))))
"""


def emulated_outputs(model: Path, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Outputs of a file in a session with default options; only with an `EMULATOR`."""
    inputs, outputs = (model.with_suffix(f".{name}.npz") for name in ("inputs", "outputs"))
    np.savez(inputs, **feeds)  # type: ignore[arg-type]
    command = [str(EMULATOR), "-cpu", "Haswell", sys.executable, "-c", _RUN, model, inputs, outputs]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    found = np.load(outputs)
    return [found[name] for name in found.files]
