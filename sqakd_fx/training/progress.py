"""What a training run tells while it goes on."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class StepReport:
    """What is known after some steps: the mean loss since the last report, and the pace.

    `agreement` is the share of held-out predictions equal to the teacher's, where it was just measured;
    `compile_seconds` is what the first step took where it was compiled (0 elsewhere), which the pace
    leaves out; `peak_bytes` the most memory so far, of the GPU or of the process, None where it is not known.
    """

    step: int
    steps: int
    loss: float
    learning_rate: float
    steps_per_second: float
    seconds_left: float
    agreement: float | None
    peak_bytes: int | None
    compile_seconds: float = 0.0


def peak_memory(device: torch.device) -> int | None:
    """The most bytes in use so far: of tensors on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
