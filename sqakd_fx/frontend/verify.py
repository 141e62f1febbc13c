"""Hold a traced graph against its model, at two batch sizes and on other values, and learn what the batch decides.

What both sizes leave equal is a constant; a number that doubles with the batch is the batch size; an
axis that grows with it is a batch axis. Node metadata: `constant`, `is_batch_size`, `batch_axes`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from sqakd_fx.diagnostics.source_lines import code_line
from sqakd_fx.errors import TraceError, first_line
from sqakd_fx.frontend.example_call import Call
from sqakd_fx.frontend.first_difference import first_difference
from sqakd_fx.frontend.float32 import in_float32
from sqakd_fx.ir import meta
from sqakd_fx.ir.batches import samples_in
from sqakd_fx.ir.op_table import op_of
from sqakd_fx.ir.other_sizes import at_other_sizes, shapes_in_words
from sqakd_fx.ir.outputs import largest_difference, tensors_of
from sqakd_fx.ir.size_queries import asks_for_size
from sqakd_fx.recipe.free_axes import names_of

_LARGEST_DIFFERENCE = 1e-3


def compare_on_two_batches(
    model: nn.Module, graph_module: fx.GraphModule, call: Call, *, other_values: bool
) -> bool:
    """Raise TraceError where the graph is another function than the model, or of one batch size only.

    With `other_values` the larger batch has samples that are not in the example, and two calls more have none of the
    example's. Where the call has free axes, the graph is held against the model at other sizes of them as well. False
    where the model itself takes the example's batch size only, or puts the samples of another together.
    """
    once = call.tensors()
    batch = samples_in(once.values(), 0)
    twice = {
        name: torch.cat([x, turned(x) if other_values else x]) if x.ndim and len(x) == batch else x
        for name, x in once.items()
    }
    pair = _Pair(model, graph_module, call)
    seen = [sizes for tensors in (once, twice) if (sizes := pair.compare(tensors)) is not None]
    if not seen:
        raise TraceError(
            "the model runs once on the example inputs and not again: let its forward keep nothing for the next call"
        )
    for other in (_shuffled, _spread) if other_values else ():
        pair.compare({name: other(x) for name, x in once.items()}, finite=True)
    others = _at_other_sizes(pair, once)
    if len(seen) == 2 and not _puts_samples_together(graph_module.graph, seen[0], seen[1], batch):
        _record(seen[0], seen[1], batch, others)
        return True
    _refuse_unbatched(seen[0], once)
    return False


@dataclass(frozen=True)
class _Pair:
    """A model and the graph that should compute the same."""

    model: nn.Module
    graph_module: fx.GraphModule
    call: Call

    def compare(self, tensors: dict[str, Tensor], *, finite: bool = False) -> _Sizes | None:
        """What the graph computes; None where the model does not run on `tensors`, or gives no `finite` output."""
        args, kwargs = self.call.with_tensors({name: x.clone() for name, x in tensors.items()})
        sizes = _Sizes(self.graph_module)
        with torch.no_grad():
            try:
                with in_float32():
                    wanted = tensors_of(self.model(*args, **kwargs))
            except Exception:
                return None  # a model for one batch size
            if finite and not all(bool(x.isfinite().all()) for x in wanted):
                return None
            try:
                got = tensors_of(sizes.run(*(x.clone() for x in tensors.values())))
            except Exception as error:
                raise self._does_not_run(error, sizes) from error
        difference = largest_difference(wanted, got)
        if not difference <= _LARGEST_DIFFERENCE:
            how = "in its shapes" if difference == math.inf else f"by {difference:.1g}"
            where = first_difference(
                self.model, self.graph_module, self.call, tensors, _LARGEST_DIFFERENCE
            )
            raise TraceError(
                f"the traced graph differs from the model {how}, {where}: its Python code depends on more "
                "than its inputs, on chance, or on the batch size: take that out of forward"
            )
        return sizes

    def _does_not_run(self, error: Exception, sizes: _Sizes) -> TraceError:
        line = code_line(sizes.latest) if sizes.latest is not None else None
        return TraceError(
            f"the traced graph does not run on another batch size or other values ({first_line(error)}"
            + (f", {line}" if line else "")
            + "): try --set frontend=export",
            location=line,
        )


def _at_other_sizes(pair: _Pair, once: dict[str, Tensor]) -> list[_Sizes]:
    """What the graph computes at other sizes of the free axes; raises TraceError where it is not the model there."""
    found = []
    for tensors in at_other_sizes(list(once.values()), pair.call.free_axes):
        named = dict(zip(once, tensors, strict=True))
        try:
            sizes = pair.compare(named)
        except TraceError as error:
            raise TraceError(
                f"the recipe frees {names_of(pair.call.free_axes)} (dynamic), and the graph holds for the example's "
                f"size only: at {shapes_in_words(tensors)}, {error}",
                location=error.location,
            ) from error
        found += [] if sizes is None else [sizes]
    return found


def _refuse_unbatched(sizes: _Sizes, inputs: dict[str, Tensor]) -> None:
    """A model of one batch size must still have a batch axis: torch takes a lone sample, ONNX has no form for it."""
    modules = dict(sizes.module.named_modules())
    lone = [
        node.name
        for node, shape in sizes.shapes.items()
        if (op := op_of(node, modules)) and op.is_convolution and len(shape) == (op.axes or 0) + 1
    ]
    if lone or all(x.ndim < 2 for x in inputs.values()):
        at = f" (layer {lone[0]} reads a sample without it)" if lone else ""
        raise TraceError(
            f"axis 0 of every input must be the batch axis{at}: give example_inputs() with a batch axis"
        )


def turned(x: Tensor) -> Tensor:
    """Other values of the same kind: floats in reverse order along every axis, as none is used to."""
    return x.flip(tuple(range(x.ndim))) if x.is_floating_point() else x


def _shuffled(x: Tensor) -> Tensor:
    """The values of floats at other places; of what else there is, the samples in reverse order."""
    if not x.is_floating_point():
        return x.flip(0) if x.ndim else x
    order = torch.randperm(x.numel(), generator=torch.Generator().manual_seed(0))
    return x.flatten()[order].reshape(x.shape)


def _spread(x: Tensor) -> Tensor:
    """Floats anywhere between the smallest and the largest, or above it by up to 1 where they are all equal."""
    if not x.is_floating_point() or not x.numel():
        return x
    low, high = float(x.min()), float(x.max())
    share = torch.rand(x.shape, generator=torch.Generator().manual_seed(1))
    return low + share * ((high - low) or 1.0)


def _puts_samples_together(graph: fx.Graph, once: _Sizes, twice: _Sizes, batch: int) -> bool:
    """Whether an output grows with the batch, and neither along its first axis nor along one of the batch's size.

    It does where a shape was written for one sample: `x.reshape(1, 6, -1)`.
    """
    for node in graph.output_node().all_input_nodes:
        sizes = zip(once.shapes.get(node, ()), twice.shapes.get(node, ()), strict=False)
        grown = [(axis, size) for axis, (size, other) in enumerate(sizes) if size != other]
        if grown and not any(axis == 0 or size == batch for axis, size in grown):
            return True
    return False


def _record(once: _Sizes, twice: _Sizes, batch: int, others: list[_Sizes]) -> None:
    for node, value in once.numbers.items():
        if all(sizes.numbers.get(node) == value for sizes in (twice, *others)):
            meta.set_constant(node, value)
        elif (value, twice.numbers.get(node)) == (batch, 2 * batch):
            meta.set_is_batch_size(node)
    for node, shape in once.shapes.items():
        other = twice.shapes.get(node, ())
        if len(shape) == len(other):
            meta.set_batch_axes(node, tuple(i for i, n in enumerate(shape) if n != other[i]))


class _Sizes(fx.Interpreter):
    """Runs a graph and keeps shapes, and the numbers that nodes compute from sizes alone."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.numbers: dict[fx.Node, Any] = {}
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        self.of_sizes: set[fx.Node] = set()
        self.latest: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        self.latest = n
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = tuple(value.shape)
        sources = n.all_input_nodes
        if asks_for_size(n) or (sources and all(s in self.of_sizes for s in sources)):
            self.of_sizes.add(n)
            if isinstance(value, int | float | torch.dtype):
                self.numbers[n] = value
        return value
