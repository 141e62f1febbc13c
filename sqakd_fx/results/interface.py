"""What is said of a model, its inputs and its outputs in every file that is made of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sqakd_fx.exporters.interface import Interface
from sqakd_fx.ir import meta
from sqakd_fx.program import Program
from sqakd_fx.recipe.free_axes import of_each


def interface_of(program: Program) -> Interface:
    """What the model, its inputs and its outputs are, as they are known of the example."""
    name = type(program.traced.graph_module).__name__
    batch = ", the example's batch size only" if program.traced.fixed_batch else ""
    free = of_each(program.free_axes, len(program.example))
    inputs = tuple(
        f"argument {argument} of {name}{_range(x)}{batch}{_any_size(x, axes)}"
        for argument, x, axes in zip(program.input_names, program.example, free, strict=True)
    )
    kinds = {one.index: one.description for one in program.outputs}
    count = len(meta.output_names(program.teacher.graph.output_node()))
    outputs = tuple(kinds.get(index, "not a floating-point output") for index in range(count))
    return Interface(name, inputs, outputs)


def _any_size(x: Tensor, axes: Mapping[int, str]) -> str:
    """The axes of any size, with the example's."""
    return "".join(
        f", any {called} that the model takes ({x.shape[axis]} in the example)"
        for axis, called in axes.items()
    )


def _range(x: Tensor) -> str:
    if not x.numel() or x.dtype == torch.bool:
        return ""
    return f", from {x.min().item():.4g} to {x.max().item():.4g} in the example"
