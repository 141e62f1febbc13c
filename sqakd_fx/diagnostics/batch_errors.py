"""What torch raises on a batch: memory is out, or the model does not take it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from sqakd_fx.errors import SourceError, short


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory is what was missing, on whichever device."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        text in str(error)
        for text in ("can't allocate memory", "not enough memory", "out of memory")
    )


def is_lost_process(error: BaseException) -> bool:
    """Whether a process that trains with this one has ended, as gloo and NCCL say it."""
    said = (
        "gloo/transport",
        "connection closed by peer",
        "connection reset by peer",
        "ncclremoteerror",
    )
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in said)


@contextlib.contextmanager
def batch_named(batch: str, inputs: tuple[Tensor, ...]) -> Iterator[None]:
    """Inside, what torch raises because the model does not take `inputs` becomes one sentence.

    Raises:
        SourceError: in place of such an error; names the batch, and its types and shapes.
    """
    try:
        yield
    except (IndexError, TypeError, ValueError, RuntimeError) as error:
        known = is_out_of_memory(error) or is_lost_process(error)
        if known or isinstance(error, TorchDynamoException):
            raise
        raise SourceError(
            f"{batch}, {_form(inputs)}, does not run through the model "
            f"({short(error)}): see that every batch is like example_inputs()"
        ) from error


def require_dense(x: Tensor, what: str) -> None:
    """Raise SourceError where a tensor of `what` is not an array of values in memory."""
    kinds = {"meta": x.is_meta, "nested": x.is_nested, "quantized": x.is_quantized}
    kind = next((name for name, true in kinds.items() if true), None)
    if kind is None and x.layout is not torch.strided:
        kind = str(x.layout).removeprefix("torch.")
    if kind is not None:
        raise SourceError(f"the {what} has a {kind} tensor: give dense ones, that hold values")


def length_of(data: Sized, what: str) -> int:
    """Its length; raises SourceError where that is no whole number of at least 0."""
    try:
        return len(data)
    except Exception as error:
        raise SourceError(
            f"the {what} does not say how long it is ({short(error)}): see that its __len__ gives a whole number"
        ) from error


def require_finite(inputs: tuple[Any, ...], batch: str) -> None:
    """Raise SourceError where an input holds NaN or infinity; names the first such sample of `batch`."""
    for x in inputs:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            continue
        finite = torch.isfinite(x)
        if not bool(finite.all()):
            bad = int((~finite.reshape(len(x), -1)).any(1).nonzero()[0]) if x.ndim else 0
            raise SourceError(
                f"{batch} holds NaN or infinity, in sample {bad} of it: clean the data"
            )


def call(module: nn.Module, *inputs: Any) -> Any:
    """`module(*inputs)`; the call of a GraphModule prints a traceback before it raises."""
    return nn.Module.__call__(module, *inputs)


def _form(inputs: tuple[Tensor, ...]) -> str:
    """As `float32 (8, 3, 32, 32) and int64 (8,)`."""
    return " and ".join(
        f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
        if isinstance(x, Tensor)
        else type(x).__name__
        for x in inputs
    )
