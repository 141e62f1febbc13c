"""A script beside the exported file that runs it with numpy and onnxruntime alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx
import torch
from torch import Tensor

from sqakd_fx.exporters.interface import BATCH
from sqakd_fx.program import Program
from sqakd_fx.storage import write_text

_SCRIPT = '''"""Runs {file} on random inputs, or on those of files: python deploy.py [{usage}X.npy ...]"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime

given = [np.load(file) for file in sys.argv[1:] if not file.isdigit()]
{batch}random = np.random.default_rng(0)
inputs = {{
{inputs}
}}
inputs |= zip(inputs, given)
file = str(Path(__file__).with_name("{file}"))
session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
for output, value in zip(session.get_outputs(), session.run(None, inputs)):
    print(output.name, value.dtype, value.shape)
'''
_BATCH = "batch = len(given[0]) if given else next((int(n) for n in sys.argv[1:]), {size})\n"


def write_deploy_script(program: Program, model: Path) -> Path:
    """Write deploy.py beside `model`, a file of the program; random inputs have the example's ranges.

    Raises:
        StorageError: the file cannot be written.
    """
    graph = onnx.load(str(model), load_external_data=False).graph
    dynamic = any(BATCH in _symbols(value) for value in graph.input)
    size = next((len(x) for x in program.example if x.ndim), 1)
    lines = [
        f"    {value.name!r}: {_random(x, _shape(value, x))},"
        for value, x in zip(graph.input, program.example, strict=True)
    ]
    text = _SCRIPT.format(
        file=model.name,
        usage="BATCH | " if dynamic else "",
        batch=_BATCH.format(size=size) if dynamic else "",
        inputs="\n".join(lines),
    )
    path = model.with_name("deploy.py")
    write_text(path, text)
    return path


def _symbols(value: onnx.ValueInfoProto) -> list[str]:
    return [size.dim_param for size in value.type.tensor_type.shape.dim]


def _shape(value: onnx.ValueInfoProto, x: Tensor) -> str:
    """The shape as Python, with a variable for the batch; other sizes are the example's."""
    sizes = [
        BATCH if symbol == BATCH else str(size)
        for symbol, size in zip(_symbols(value), x.shape, strict=True)
    ]
    return f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"


def _random(x: Tensor, shape: str) -> str:
    """An expression for random values of the type of `x`, within its finite values."""
    kind = str(x.dtype).removeprefix("torch.")
    if x.dtype == torch.bool:
        return f'random.integers(0, 2, {shape}).astype("{kind}")'
    finite = x[torch.isfinite(x)]
    low, high = _bounds(finite.tolist())
    if x.is_floating_point():
        return f'random.uniform({low:.4g}, {high:.4g}, {shape}).astype("{kind}")'
    return f'random.integers({low}, {high}, {shape}, "{kind}", endpoint=True)'


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    """The smallest and the largest; 0 and 1 of values that are all 0, or none."""
    low, high = min(values, default=0), max(values, default=1)
    return (low, high) if low or high else (0, 1)
