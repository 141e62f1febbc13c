"""What a training run tells while it goes on: notes, and reports of its steps."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sqakd_fx.engine.distributed import mean_of

_REPORT_STEPS = 20


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


@dataclass(frozen=True)
class Listener:
    """Who hears of a run: of its steps, and in sentences of what a user should know."""

    on_report: Callable[[StepReport], None] = lambda report: None
    on_note: Callable[[str], None] = lambda text: None
    on_step: Callable[[int, int], None] = lambda done, total: None


NOBODY = Listener()


@dataclass(frozen=True)
class Window:
    """The steps since the last report: their mean loss, and what one took."""

    loss: float
    seconds_a_step: float


class Reporter:
    """Tells a listener of a run of `total` steps; losses stay on the device between two reports."""

    def __init__(self, listener: Listener, total: int, device: torch.device) -> None:
        self.listener, self.total, self.device = listener, total, device
        self.notes: list[str] = []
        self.compile_seconds = 0.0
        self.awaits_compiling = False
        self.start(0)

    def note(self, text: str) -> None:
        """A sentence for the user."""
        self.notes.append(text)
        self.listener.on_note(text)

    def note_once(self, text: str) -> None:
        """A sentence for the user, who has not heard it before."""
        if text not in self.notes:
            self.note(text)

    def start(self, step: int) -> None:
        """A window begins behind `step` steps."""
        self.losses = torch.zeros((), device=self.device)
        self.reported = self.paced = step
        self.clock = time.monotonic()

    def add(self, loss: Tensor, step: int) -> None:
        """One more step is done, `step` in all; the pace leaves out the first one of a compiled run."""
        self.losses += loss
        self.listener.on_step(step, self.total)
        if not self.awaits_compiling:
            return
        self.awaits_compiling, self.compile_seconds = False, time.monotonic() - self.clock
        self.note(f"the first step took {self.compile_seconds:.0f} s to compile and run")
        if step < self.total:
            self.paced, self.clock = step, time.monotonic()

    def is_due(self, step: int) -> bool:
        """Whether a report is due behind this step; equal in all processes."""
        return step - self.reported >= _REPORT_STEPS or step == self.total

    def window(self, step: int) -> Window:
        """The window up to `step`; all processes call it together."""
        loss = float(mean_of(self.losses)) / (step - self.reported)
        seconds, steps = time.monotonic() - self.clock, step - self.paced
        return Window(loss, seconds / steps if steps else self.compile_seconds)

    def report(
        self, window: Window, step: int, learning_rate: float, agreement: float | None
    ) -> None:
        """Tell of a window that ends behind `step`, and begin the next one."""
        self.listener.on_report(
            StepReport(
                step=step,
                steps=self.total,
                loss=window.loss,
                learning_rate=learning_rate,
                steps_per_second=1 / max(window.seconds_a_step, 1e-9),
                seconds_left=window.seconds_a_step * (self.total - step),
                agreement=agreement,
                peak_bytes=peak_memory(self.device),
                compile_seconds=self.compile_seconds,
            )
        )
        self.start(step)


def peak_memory(device: torch.device) -> int | None:
    """The most bytes in use so far: of tensors on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
