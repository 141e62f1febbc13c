"""Many processes as one: every process takes its share of the same global batch.

Started by torchrun. All processes load the same batches and keep their rows; BatchNorm sums, gradients and
losses are reduced, so that the run is that of one process with the whole batch.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm

from sqakd_fx.diagnostics.batch_errors import is_lost_process
from sqakd_fx.errors import TrainingError
from sqakd_fx.quant.batch_norm import settled, track
from sqakd_fx.quant.quantizer import Quantizer


def is_distributed() -> bool:
    """True inside a process group of more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def process_count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if is_distributed() else 1


def is_first() -> bool:
    """True in the process that writes and talks."""
    return not is_distributed() or dist.get_rank() == 0


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """The process group that torchrun describes; nothing where it did not start this process.

    Raises:
        TrainingError: another process has ended.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        raise TrainingError(
            "another process of this run has ended, which the output of torchrun names: mend its cause, and go on from "
            "the last checkpoint with --resume"
        ) from error
    finally:
        dist.destroy_process_group()


def share_of(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """This process's rows of a batch, as even as they come."""
    if not is_distributed():
        return inputs
    size, rank = dist.get_world_size(), dist.get_rank()
    rows = len(inputs[0])
    return tuple(
        x.tensor_split(size)[rank] if isinstance(x, Tensor) and x.ndim and len(x) == rows else x
        for x in inputs
    )


def weight_of_share(inputs: tuple[Tensor, ...], mine: tuple[Tensor, ...]) -> float:
    """What this process's mean counts in the mean over the whole batch, times the processes."""
    return len(mine[0]) * dist.get_world_size() / len(inputs[0]) if is_distributed() else 1.0


def mean_of(value: Tensor) -> Tensor:
    """The mean of a scalar over the processes; `value` stays as it is."""
    if not is_distributed():
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def variance_of_all(x: Tensor) -> Tensor:
    """The variance of the values of all processes, of shape (), without a gradient."""
    x = x.detach()
    total = torch.stack([x.sum(), x.new_tensor(float(x.numel()))])
    dist.all_reduce(total)
    squares = (x - total[0] / total[1]).square().sum()
    dist.all_reduce(squares)
    return squares / total[1]


def any_process(flag: bool, device: torch.device) -> bool:
    """True where the flag is set in any process."""
    if not is_distributed():
        return flag
    total = torch.tensor(float(flag), device=device)
    dist.all_reduce(total)
    return bool(total > 0)


def is_everywhere(number: int, device: torch.device) -> bool:
    """Whether every process has the number that the first one has."""
    if not is_distributed():
        return True
    first = torch.tensor(number, device=device)
    dist.broadcast(first, 0)
    return not any_process(int(first) != number, device)


def with_reduced_gradients(student: nn.Module) -> nn.Module:
    """The student as it is called in training: behind DistributedDataParallel where there are many."""
    if not is_distributed():
        return student
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of a newer name of broadcast_buffers
        return nn.parallel.DistributedDataParallel(student, broadcast_buffers=False)


@contextmanager
def synchronized(student: nn.Module) -> Iterator[None]:
    """BatchNorm over the global batch, and weight gradients reduced where a quantizer bends them.

    EWGS scales a gradient by a function of its sign: that has to see the sum over all processes.
    """
    if not is_distributed():
        yield
        return
    handles = [
        module.register_forward_hook(_reduce_before_backward)
        for module in student.modules()
        if isinstance(module, Quantizer) and module.role == "weight" and module.modulated
    ]
    norms = [module for module in student.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.forward = functools.partial(_global_batch_norm, norm)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward
        for handle in handles:
            handle.remove()


def _reduce_before_backward(module: nn.Module, inputs: Any, output: Tensor) -> None:
    def mean(gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()

    if output.requires_grad:
        output.register_hook(mean)  # type: ignore[no-untyped-call]


def _global_batch_norm(own: _BatchNorm, x: Tensor) -> Tensor:
    """BatchNorm with the statistics of all processes in training (torch's own needs a GPU)."""
    if not own.training:
        return settled(own, x)
    wide = x.float()
    variance, mean = torch.var_mean(wide, [0, *range(2, x.ndim)], correction=0)
    mean, variance, total = _of_all_processes(mean, variance, x.numel() // x.shape[1])
    track(own, mean.detach(), variance.detach() * total / (total - 1))
    shape = (1, -1) + (1,) * (x.ndim - 2)
    y: Tensor = (wide - mean.reshape(shape)) * torch.rsqrt(variance + own.eps).reshape(shape)
    if own.affine:
        y = y * own.weight.reshape(shape) + own.bias.reshape(shape)
    return y.to(x.dtype)


def _of_all_processes(mean: Tensor, variance: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and number of all processes' values, from each one's (channels,) and number.

    Sums of squares would lose the variance where the mean is large: n v = Σ n_i (v_i + (m_i - m)²).
    """
    own = torch.cat([mean, variance, mean.new_full((1,), float(count))])
    rows = [torch.zeros_like(own)] * dist.get_world_size()
    rows[dist.get_rank()] = own
    everyone = all_reduce(torch.stack(rows))  # type: ignore[no-untyped-call]
    means, variances = everyone[:, :-1].chunk(2, dim=1)
    counts = everyone[:, -1:].detach()
    total = counts.sum()
    shared = (counts * means).sum(0) / total
    spread = (counts * (variances + (means - shared).square())).sum(0) / total
    return shared, spread, total
