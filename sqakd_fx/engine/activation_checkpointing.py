"""Less memory for more time: a student in segments that keep only their inputs and are computed again.

In the backward pass a segment runs a second time to have what its gradients need; BatchNorm then takes the same
batch statistics and leaves its running ones alone.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from sqakd_fx.engine.segments import segmented


def checkpointed(student: fx.GraphModule) -> fx.GraphModule:
    """`student` in segments; it has the same parameters and gives the same results."""
    for module in student.modules():
        if getattr(module, "inplace", False):
            module.__dict__["inplace"] = False  # a segment needs its inputs again
    return segmented(student, _ComputedTwice)


class _ComputedTwice(nn.Module):
    """Calls a segment, which runs again in the backward pass."""

    def __init__(self, segment: fx.GraphModule) -> None:
        super().__init__()
        for node in segment.graph.nodes:
            if "inplace" in node.kwargs:
                node.update_kwarg("inplace", False)
        segment.recompile()
        self.segment = segment

    def forward(self, *inputs: Any) -> Any:
        contexts = functools.partial(_contexts, self.segment)
        return checkpoint(self.segment, *inputs, use_reentrant=False, context_fn=contexts)


def _contexts(
    segment: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What surrounds the first and the second run of a segment."""
    return nullcontext(), _running_statistics_held(segment)


@contextmanager
def _running_statistics_held(segment: nn.Module) -> Iterator[None]:
    """Inside, BatchNorm in training keeps its running statistics; its operations are the same ones."""
    norms = [module for module in segment.modules() if isinstance(module, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
