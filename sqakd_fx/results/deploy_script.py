"""A script beside the exported file that runs it with numpy and onnxruntime alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx
import torch
from torch import Tensor

from sqakd_fx.program import Program
from sqakd_fx.recipe.keys import BATCH
from sqakd_fx.runtime.preprocessing import given_to, of_metadata
from sqakd_fx.storage import write_text

_SCRIPT = '''"""Runs {file} on random inputs, or on those of files: python deploy.py [{usage}X.npy ...]"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime

given = [np.load(word) for word in sys.argv[1:] if word.endswith(".npy")]
{sizes}random = np.random.default_rng(0)
inputs = {{
{inputs}
}}
inputs |= zip(inputs, given)
file = str(Path(__file__).with_name("{file}"))
session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
for output, value in zip(session.get_outputs(), session.run(None, inputs)):
    print(output.name, value.dtype, value.shape)
'''
_BATCH = """batch = len(given[0]) if given else next((int(n) for n in sys.argv[1:] if n.isdigit()), {batch})
"""
_SIZES = """sizes = {sizes} | {{"batch": word for word in sys.argv[1:] if word.isdigit()}}
sizes |= dict(word.split("=") for word in sys.argv[1:] if "=" in word)
for axes, x in zip({axes}, given):
    sizes |= {{name: x.shape[axis] for axis, name in axes.items()}}
{names} = map(int, sizes.values())
"""


def write_deploy_script(program: Program, model: Path) -> Path:
    """Write deploy.py beside `model`, a file of the program; random inputs have the example's ranges.

    Raises:
        StorageError: the file cannot be written.
    """
    proto = onnx.load(str(model), load_external_data=False)
    graph = proto.graph
    taken = of_metadata({one.key: one.value for one in proto.metadata_props})
    pairs = zip(graph.input, program.example, strict=True)
    example = [given_to(taken, value.name, x) for value, x in pairs]
    lines = [
        f"    {value.name!r}: {_random(x, _shape(value, x))},"
        for value, x in zip(graph.input, example, strict=True)
    ]
    usage, sizes = _open_sizes(graph, example)
    text = _SCRIPT.format(file=model.name, usage=usage, sizes=sizes, inputs="\n".join(lines))
    path = model.with_name("deploy.py")
    write_text(path, text)
    return path


def _open_sizes(graph: onnx.GraphProto, example: Sequence[Tensor]) -> tuple[str, str]:
    """How the command line says the sizes that are free, and the code that reads them."""
    axes = [
        {axis: symbol for axis, symbol in enumerate(_symbols(value)) if symbol}
        for value in graph.input
    ]
    sizes = {
        symbol: x.shape[axis]
        for x, found in zip(example, axes, strict=True)
        for axis, symbol in found.items()
    }
    batch = sizes.get(BATCH)
    if not sizes:
        return "", ""
    if set(sizes) == {BATCH}:
        return "BATCH | ", _BATCH.format(batch=batch)
    usage = "".join(f"{name}=N " for name in sizes if name != BATCH)
    names = ", ".join(sizes) + ("," if len(sizes) == 1 else "")
    code = _SIZES.format(sizes=sizes, axes=axes, names=names)
    return f"{'BATCH ' if batch else ''}{usage}| ", code


def _symbols(value: onnx.ValueInfoProto) -> list[str]:
    return [size.dim_param for size in value.type.tensor_type.shape.dim]


def _shape(value: onnx.ValueInfoProto, x: Tensor) -> str:
    """The shape as Python, with variables for sizes that are free; other sizes are the example's."""
    sizes = [symbol or str(size) for symbol, size in zip(_symbols(value), x.shape, strict=True)]
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
