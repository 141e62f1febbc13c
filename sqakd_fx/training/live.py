"""What a run shows: a live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from sqakd_fx.diagnostics.terminal import console
from sqakd_fx.diagnostics.wording import printable

if TYPE_CHECKING:
    from sqakd_fx.training.progress import StepReport

_PLAIN_SECONDS = 5.0
_SILENT_SECONDS = 30.0
"""After which a stage says how far it is, where there is no live view."""
_WIDE = 110
_ROOM_FOR_CURVES = 118
_BARS = "▁▂▃▄▅▆▇█"


def curve(values: Sequence[float], cells: int = 8) -> str:
    """The course of some values in one line of blocks, from the lowest to the highest; none of fewer than two."""
    if len(values) < 2:
        return ""
    width = min(cells, len(values))
    ends = [(cell + 1) * len(values) // width for cell in range(width)]
    shown = [values[end - 1] for end in ends]
    lowest, spread = min(shown), max(shown) - min(shown)
    places = [round((one - lowest) / spread * (len(_BARS) - 1)) if spread else 0 for one in shown]
    return "".join(_BARS[place] for place in places)


class _Count(ProgressColumn):
    """120 of 240, where a stage says of how many."""

    def render(self, task: Task) -> Text:
        """How many are done."""
        known = task.total is not None
        return Text(f"{task.completed:.0f} of {task.total:.0f}" if known else "")


class _Left(ProgressColumn):
    """The time that is left, or the time that a stage has taken where it does not say how long it is."""

    def render(self, task: Task) -> Text:
        """Minutes and seconds."""
        if task.time_remaining is not None:
            return Text(f"{_clock(task.time_remaining)} left")
        return Text(_clock(task.elapsed or 0))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Live:
    """An observer of a run that draws progress on stderr and keeps a line for each stage."""

    def __init__(self) -> None:
        first = os.environ.get("RANK", "0") == "0"  # of torchrun's processes, only one talks
        self.console = console(stderr=True, quiet=not first)
        self.progress_bar: Progress | None = None
        self.task: TaskID | None = None
        self.current: tuple[str, str] | None = None
        self.started = time.monotonic()
        self.spoke = 0.0
        self.agreement = ""
        self.losses: list[float] = []
        self.agreements: list[float] = []

    def __enter__(self) -> Live:
        if self.console.is_terminal and not self.console.is_jupyter:
            self.progress_bar = Progress(
                TextColumn("{task.description:<9}", markup=False),
                BarColumn(bar_width=24 if self.console.width >= _WIDE else 8),
                _Count(),
                TextColumn("{task.fields[detail]}", markup=False),
                _Left(),
                console=self.console,
                transient=True,
                refresh_per_second=4,
            )
            self.progress_bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close(done=kind is None)
        if self.progress_bar is not None:
            self.progress_bar.stop()

    def stage(self, name: str, detail: str = "") -> None:
        """A new stage begins; the one before is done."""
        self._close(done=True)
        detail = printable(detail)
        self.current = (name, detail)
        self.started = self.spoke = time.monotonic()
        if self.progress_bar is not None:
            room = max(self.console.width - 50, 10)
            shown = detail if len(detail) <= room else f"{detail[: room - 1]}…"
            self.task = self.progress_bar.add_task(name, total=None, detail=shown)

    def _close(self, *, done: bool) -> None:
        if self.progress_bar is not None and self.task is not None:
            self.progress_bar.remove_task(self.task)
            self.task = None
        if self.current is not None and done:
            name, detail = self.current
            elapsed = time.monotonic() - self.started
            self._say(f"{name:<10} {elapsed:6.1f} s  {detail}")
        self.current = None

    def progress(self, done: int, total: int) -> None:
        """Batches or steps of a stage."""
        if self.progress_bar is not None and self.task is not None:
            self.progress_bar.update(self.task, completed=done, total=total)
        elif time.monotonic() - self.spoke > _SILENT_SECONDS:
            self.spoke = time.monotonic()
            left = (self.spoke - self.started) / done * (total - done) if done else 0.0
            line = f"  {done} of {total}, about {left:.0f} s left"
            self._say(line)

    def training(self, report: StepReport) -> None:
        """Steps of the distillation."""
        if math.isfinite(report.loss):
            self.losses.append(report.loss)
        if report.agreement is not None:
            self.agreement = f"  agreement {report.agreement:.1%}"
            self.agreements.append(report.agreement)
        short = f"loss {report.loss:.4f}{self.agreement}"
        memory = "" if report.peak_bytes is None else f"  peak {report.peak_bytes / 2**30:.2f} GiB"
        detail = f"{short}  {report.steps_per_second:.1f} steps/s{memory}"
        if self.progress_bar is not None and self.task is not None:
            shown = detail if self.console.width >= _WIDE else short
            if self.console.width >= _ROOM_FOR_CURVES and not self.console.options.ascii_only:
                shown = self._with_curves(report)
            self.progress_bar.update(
                self.task, completed=report.step, total=report.steps, detail=shown
            )
        elif time.monotonic() - self.spoke > _PLAIN_SECONDS or report.step == report.steps:
            self.spoke = time.monotonic()
            left = f"  {report.seconds_left:.0f} s left" if report.step < report.steps else ""
            line = f"  step {report.step} of {report.steps}: {detail}{left}"
            self._say(line)

    def _with_curves(self, report: StepReport) -> str:
        """Loss, agreement and pace, with the course of the first two."""
        loss = f"loss {report.loss:.4f} {curve(self.losses)}".rstrip()
        agreement = f"{self.agreement} {curve(self.agreements)}".rstrip()
        return f"{loss}{agreement}  {report.steps_per_second:.1f} steps/s"

    def _say(self, line: str) -> None:
        """A line that stays; a terminal breaks it between words, a file or a pipe has it whole."""
        self.console.print(line, soft_wrap=not self.console.is_terminal)

    def note(self, text: str) -> None:
        """Something the user should know."""
        self._say(f"  note: {printable(text)}")
