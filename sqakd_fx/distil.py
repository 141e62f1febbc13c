"""Self-supervised quantization-aware distillation: the training loop.

The student starts from the teacher, sees the same unlabelled batches, and minimises the distance of
its output from the teacher's. Losses stay on the device between reports, so a step costs no
synchronisation. A run can be interrupted at any moment and goes on from its last checkpoint.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from sqakd_fx.compilation import has_compiler, wants_compilation
from sqakd_fx.craft import low_bit_craft
from sqakd_fx.distributed import any_process, is_distributed, mean_of, synchronised
from sqakd_fx.errors import SqakdError, TrainingError
from sqakd_fx.interrupts import collected_signals
from sqakd_fx.optimizer import make_optimizer, schedule, set_rates
from sqakd_fx.randomness import seed_everything
from sqakd_fx.recipe import Recipe
from sqakd_fx.recovery import Recovery, TrainingState
from sqakd_fx.training_step import GradientStep

_REPORT_STEPS = 20


@dataclass(frozen=True)
class StepReport:
    """What is known after some steps: the mean loss since the last report, and the pace."""

    step: int
    steps: int
    loss: float
    learning_rate: float
    steps_per_second: float


@dataclass(frozen=True)
class Distilled:
    """The end of a run: steps done, the last mean loss, seconds, whether it ran compiled, notes."""

    steps: int
    loss: float
    seconds: float
    compiled: bool
    notes: tuple[str, ...]


class Interrupted(SqakdError):
    """SIGINT or SIGTERM arrived; the state is saved."""


class _NotFinite(Exception):
    pass


Batches = Callable[[int], Iterable[tuple[Any, ...]]]
"""Epoch number to an iterable of input tuples; the same number gives the same batches."""


def distil(
    student: fx.GraphModule,
    teacher: nn.Module,
    batches: Batches,
    recipe: Recipe,
    *,
    steps_per_epoch: int,
    device: torch.device,
    checkpoints: Path | None = None,
    resume: bool = False,
    on_report: Callable[[StepReport], None] = lambda report: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> Distilled:
    """Train `student` (calibrated, on `device`) in place; it ends in evaluation mode.

    `checkpoints` is a folder for checkpoints, None for none. With `resume`, training goes on from
    the newest undamaged one.

    Raises:
        TrainingError: there is no data, or the loss is not finite even at lower learning rates.
        Interrupted: SIGINT or SIGTERM; the state is in `checkpoints`.
    """
    run = _Run(
        student, teacher, batches, recipe, steps_per_epoch, device, checkpoints, on_report, on_note
    )
    if resume and checkpoints is not None:
        run.recovery.restore_latest(run.total)
    return run.train()


class _Run:
    """One training run."""

    def __init__(
        self,
        student: fx.GraphModule,
        teacher: nn.Module,
        batches: Batches,
        recipe: Recipe,
        steps_per_epoch: int,
        device: torch.device,
        checkpoints: Path | None,
        on_report: Callable[[StepReport], None],
        on_note: Callable[[str], None],
    ) -> None:
        self.student = student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.teacher = teacher.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self.batches, self.recipe, self.device = batches, recipe, device
        self.on_report, self.on_note = on_report, on_note
        self.steps_per_epoch = max(steps_per_epoch, 1)
        self.total = recipe.steps if recipe.steps is not None else recipe.epochs * steps_per_epoch
        self.notes: list[str] = []
        self.craft = low_bit_craft(student, recipe, self.total)
        self.state = TrainingState(student, make_optimizer(student, recipe), self.craft)
        self.gradient = GradientStep(student, teacher, self.craft, recipe, device, self.note)
        self.recovery = Recovery(self.state, recipe, checkpoints, device, self.note)

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.on_note(text)

    def train(self) -> Distilled:
        started = time.monotonic()
        compiled = self._compile()
        self.student.train()
        mean = float("nan")
        with synchronised(self.student), collected_signals() as signalled:
            while self.state.step < self.total:
                try:
                    mean = self._until_end(signalled)
                except _NotFinite:
                    self.recovery.roll_back()
        for craft in self.craft:
            craft.finish()
        self.student.eval()
        return Distilled(
            self.state.step, mean, time.monotonic() - started, compiled, tuple(self.notes)
        )

    def _until_end(self, signalled: list[int]) -> float:
        """Steps until the last one; raises _NotFinite where a loss is not."""
        state, mean = self.state, float("nan")
        total = torch.zeros((), device=self.device)
        reported, clock = state.step, time.monotonic()
        for inputs in self._inputs():
            total += self._one_step(inputs)
            due = (
                state.step - reported >= _REPORT_STEPS
                or state.step == self.total
                or self.recovery.is_due_by_step()
            )
            stop = (
                any_process(bool(signalled), self.device)
                if due
                else (bool(signalled) and not is_distributed())
            )
            if not (due or stop):
                continue
            mean = float(mean_of(total)) / (state.step - reported)
            if not math.isfinite(mean):
                raise _NotFinite
            now = time.monotonic()
            pace = (state.step - reported) / max(now - clock, 1e-9)
            rate = float(state.optimizer.param_groups[0]["lr"])
            self.on_report(StepReport(state.step, self.total, mean, rate, pace))
            reported, clock = state.step, now
            total = torch.zeros((), device=self.device)
            self.recovery.save_if_due(force=stop)
            if stop:
                raise Interrupted(
                    f"stopped at step {state.step} of {self.total}: "
                    + (
                        "the state is saved, go on with --resume"
                        if self.recovery.saves
                        else "nothing was saved"
                    )
                )
        return mean

    def _inputs(self) -> Iterator[tuple[Any, ...]]:
        """The batches of the steps that are left; an epoch's order and augmentation follow its seed."""
        step = self.state.step
        while step < self.total:
            epoch, skip = divmod(step, self.steps_per_epoch)
            seed_everything(self.recipe.seed * 1_000_003 + epoch)
            for inputs in itertools.islice(self._repeated(epoch), skip, self.steps_per_epoch):
                yield inputs
                step += 1
                if step == self.total:
                    return

    def _repeated(self, epoch: int) -> Iterator[tuple[Any, ...]]:
        """An epoch's batches, again where they are fewer than they were counted."""
        while True:
            drawn = False
            for inputs in self.batches(epoch):
                drawn = True
                yield inputs
            if not drawn:
                raise TrainingError("the training data gave no batch: check train_data() or --data")

    def _one_step(self, inputs: tuple[Any, ...]) -> Tensor:
        state = self.state
        set_rates(
            state.optimizer, state.rate_factor * schedule(self.recipe, state.step, self.total)
        )
        for craft in self.craft:
            craft.before_step(state.step, self.total)
        loss = self.gradient(inputs)
        state.optimizer.step()
        for craft in self.craft:
            craft.after_step(state.step, self.total)
        state.step += 1
        return loss

    def _compile(self) -> bool:
        if not wants_compilation(self.recipe, self.total - self.state.step):
            return False
        if not has_compiler(self.device):
            self.note("no C++ compiler was found: training runs uncompiled, about half as fast")
            return False
        self.note("compiling the student and the teacher for the first step (about a minute)")
        self.student.compile()
        self.teacher.compile()
        return True
