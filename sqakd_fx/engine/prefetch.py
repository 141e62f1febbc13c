"""Batches on their way to a GPU while it computes."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class _Copied(NamedTuple):
    """A batch that is being copied, and the event of its arrival."""

    batch: tuple[Tensor, ...]
    arrival: torch.cuda.Event


def ahead(
    batches: Iterable[tuple[Tensor, ...]], device: torch.device
) -> Iterator[tuple[Tensor, ...]]:
    """The batches on `device`, a GPU; each is copied while the step of the one before is computed.

    Copies go from page-locked memory on a stream of their own, so that the host does not wait for them. A batch
    that the GPU has no room for beside the one before stays where it is.
    """
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    copied = (_copied(batch, device, stream) for batch in batches)
    for now, _ in itertools.pairwise(itertools.chain(copied, (None,))):
        assert now is not None
        reader = torch.cuda.current_stream(device)
        reader.wait_event(now.arrival)
        for x in now.batch:
            if isinstance(x, Tensor) and x.is_cuda:
                x.record_stream(reader)
        yield now.batch


def _copied(batch: tuple[Tensor, ...], device: torch.device, stream: torch.cuda.Stream) -> _Copied:
    with torch.cuda.stream(stream):
        with contextlib.suppress(torch.OutOfMemoryError):
            batch = tuple(_placed(x, device) if isinstance(x, Tensor) else x for x in batch)
        return _Copied(batch, stream.record_event())


def _placed(x: Tensor, device: torch.device) -> Tensor:
    if x.device.type != "cpu":
        return x.to(device)
    return (x if x.is_pinned() else x.pin_memory()).to(device, non_blocking=True)
