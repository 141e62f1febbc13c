"""What a saved student is validated on: the user's data where it is named, else inputs drawn within its own ranges."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from sqakd_fx.diagnostics.batch_errors import require_finite
from sqakd_fx.frontend.example_call import Call
from sqakd_fx.quant.quantizer import Quantizer
from sqakd_fx.results.student import SavedStudent
from sqakd_fx.source.arrays import read_data
from sqakd_fx.source.batches import Loading, input_batches
from sqakd_fx.source.items import form_of
from sqakd_fx.source.sizes import require_example_size

_DRAWN_SAMPLES = 64
_DATA_SAMPLES = 512
_SAMPLES_AT_ONCE = 256


def inputs_of(
    saved: SavedStudent, data: Path, tokenizer: str | None = None
) -> Iterator[tuple[Tensor, ...]]:
    """Batches of at most 512 samples of --data; `tokenizer` is for sentences.

    Raises:
        SourceError: the data cannot be read, or is not what the student takes.
    """
    names = saved.input_names
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature([inspect.Parameter(name, positional) for name in names])
    call = Call(signature, saved.example, {})
    shape = tuple(saved.example[0].shape)
    samples = read_data(data, shape, tokenizer=tokenizer, takes=names)
    loading = Loading(_SAMPLES_AT_ONCE, drop_last=False)
    seen = 0
    batches = input_batches(samples, form_of(call), loading, what="data to validate on")
    for index, batch in enumerate(batches):
        inputs = call.flatten(batch.args, batch.kwargs)
        require_finite(inputs, f"batch {index} of the data to validate on")
        require_example_size(saved, inputs, "data to validate on")
        yield inputs
        seen += len(inputs[0])
        if seen >= _DATA_SAMPLES:
            return


def drawn_inputs(saved: SavedStudent) -> Iterator[tuple[Tensor, ...]]:
    """The example, then inputs of its shape: floats drawn within the trained range, the example's whole numbers."""
    generator = torch.Generator().manual_seed(0)
    ranges = [_range(saved, index) for index in range(len(saved.example))]
    size = max(len(saved.example[0]) if saved.example[0].ndim else 1, 1)
    yield saved.example
    for _ in itertools.repeat(None, -(-_DRAWN_SAMPLES // size)):
        yield tuple(
            lower + (upper - lower) * torch.rand(x.shape, generator=generator)
            if x.is_floating_point()
            else x
            for x, (lower, upper) in zip(saved.example, ranges, strict=True)
        )


def _range(saved: SavedStudent, index: int) -> tuple[float, float]:
    """The interval of an input's quantizer; of the example's values where none reads it."""
    node = saved.student.graph.find_nodes(op="placeholder")[index]
    modules = dict(saved.student.named_modules())
    for user in node.users:
        quantizer = modules.get(str(user.target)) if user.op == "call_module" else None
        if isinstance(quantizer, Quantizer) and quantizer.enabled:
            grid = quantizer.grid()
            scale = float(grid.scale)
            return (grid.qmin - grid.zero_point) * scale, (grid.qmax - grid.zero_point) * scale
    x = saved.example[index].float()
    return (float(x.min()), float(x.max())) if x.numel() else (0.0, 0.0)
