"""Self-supervised quantization-aware distillation: the training loop.

The student starts from the teacher, sees the same unlabelled batches, and minimizes the distance of
its output from the teacher's. Losses stay on the device between reports, so a step costs no
synchronization. A run can be interrupted at any moment and goes on from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import TorchDynamoException

from sqakd_fx.diagnostics.batch_errors import batch_named
from sqakd_fx.engine.activation_checkpointing import checkpointed
from sqakd_fx.engine.batch_norm_kernel import batch_norm_by_rows
from sqakd_fx.engine.compilation import compiler_settings, wants_compiling, why_uncompiled
from sqakd_fx.engine.distributed import any_process, is_distributed, is_first, mean_of, synchronized
from sqakd_fx.engine.kept_memory import kept_memory
from sqakd_fx.engine.memory_format import store_channels_last
from sqakd_fx.engine.prefetch import ahead
from sqakd_fx.engine.sharded_teacher import sharded
from sqakd_fx.engine.signals import collected_signals
from sqakd_fx.errors import SqakdError, short
from sqakd_fx.recipe import Recipe
from sqakd_fx.training.callbacks import low_bit_callbacks
from sqakd_fx.training.features import training_pair
from sqakd_fx.training.held_out import HeldOut
from sqakd_fx.training.mixing import can_mix, mixed
from sqakd_fx.training.optimizer import make_optimizer, schedule, set_rates
from sqakd_fx.training.progress import StepReport, peak_memory
from sqakd_fx.training.state import Recovery, TrainingState
from sqakd_fx.training.step import GradientStep
from sqakd_fx.training.step_batches import EpochBatches, StepBatches
from sqakd_fx.training.teacher_cache import TeacherCache, fingerprint_of

_REPORT_STEPS = 20
_EXPLODED = 10.0
"""Times the loss of the first report (at least 1) from which on a run has diverged."""


@dataclass(frozen=True)
class Distilled:
    """The end of a run; `loss` and `agreement` (held out, None where not measured) are the last ones."""

    steps: int
    loss: float
    agreement: float | None
    seconds: float
    compiled: bool
    notes: tuple[str, ...]


class Interrupted(SqakdError):
    """SIGINT or SIGTERM arrived; the state is saved."""


class _Diverged(Exception):
    """The loss is not finite, or far beyond where it began; holds the last batch."""

    def __init__(self, inputs: tuple[Any, ...]) -> None:
        self.inputs = inputs


def distil(
    student: fx.GraphModule,
    teacher: nn.Module,
    batches: EpochBatches,
    recipe: Recipe,
    *,
    steps_per_epoch: int,
    device: torch.device,
    held_out: Iterable[tuple[Any, ...]] = (),
    checkpoints: Path | None = None,
    teacher_outputs: Path | None = None,
    resume: bool = False,
    on_report: Callable[[StepReport], None] = lambda report: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> Distilled:
    """Train `student` (calibrated, on `device`) in place; it ends in evaluation mode. `teacher` is moved there.

    On `held_out`, batches that `batches` does not give, the agreement with the teacher is measured.
    `checkpoints` is a folder for checkpoints, None for none. With `resume`, training goes on from
    the newest undamaged one. `teacher_outputs` is a folder for what a recipe with `cache_teacher` keeps.

    Raises:
        SourceError: the model does not take a batch.
        TrainingError: there is no data, or the loss diverges even at lower learning rates.
        Interrupted: SIGINT or SIGTERM; the state is in `checkpoints`.
    """
    run = _Run(
        student, teacher, batches, recipe, steps_per_epoch, device, checkpoints, on_report, on_note
    )
    if held_out := list(held_out):
        run.held_out = HeldOut(held_out, run.pair.teacher_output, device)
    if recipe.early_stop is not None and run.held_out is None:
        run.note("early_stop has no effect: there are no held-out samples to measure agreement on")
    if recipe.delta_refresh and recipe.delta_refresh * run.steps_per_epoch >= run.total:
        run.note("delta_refresh has no effect: training ends before its first refresh")
    if recipe.feature_fade and not recipe.feature_weight:
        run.note("feature_fade has no effect: feature_weight is 0")
    if run.pair.note is not None:
        run.note(run.pair.note)
    if recipe.cache_teacher and teacher_outputs is not None:
        run.cache_teacher(teacher_outputs)
    if resume and checkpoints is not None:
        run.recovery.restore_latest(run.total)
    return run.train()


class _Run:
    """One training run."""

    def __init__(
        self,
        student: fx.GraphModule,
        teacher: nn.Module,
        batches: EpochBatches,
        recipe: Recipe,
        steps_per_epoch: int,
        device: torch.device,
        checkpoints: Path | None,
        on_report: Callable[[StepReport], None],
        on_note: Callable[[str], None],
    ) -> None:
        for net in (student, teacher):
            store_channels_last(net)
        self.student, self.teacher = student, teacher.eval()
        self.recipe, self.device = recipe, device
        self.on_report, self.on_note = on_report, on_note
        self.steps_per_epoch = max(steps_per_epoch, 1)
        self.batches = StepBatches(batches, recipe, self.steps_per_epoch, device)
        self.total = recipe.steps if recipe.steps is not None else recipe.epochs * steps_per_epoch
        self.held_out: HeldOut | None = None
        self.agreement: float | None = None
        self.cache: TeacherCache | None = None
        self.compiling = False
        self.compile_seconds = 0.0
        self.notes: list[str] = []
        self.pair = training_pair(student, teacher, recipe)
        self.callbacks = low_bit_callbacks(
            student, recipe, self.batches.calibration, self.pair, self.steps_per_epoch
        )
        self.teacher_is_sharded = recipe.shard_teacher and self._shard_teacher()
        if not self.teacher_is_sharded:
            self.pair.teacher.to(device)
        self.state = TrainingState(student, make_optimizer(student, recipe), self.callbacks)
        if recipe.checkpoint_activations:
            self._checkpoint_activations()
        self.gradient = GradientStep(self.pair, recipe, device, self.note)
        self.recovery = Recovery(self.state, recipe, checkpoints, device, self.note)

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.on_note(text)

    def _checkpoint_activations(self) -> None:
        if is_distributed():
            self.note("checkpoint_activations has no effect: there are several processes")
            return
        assert isinstance(self.pair.student, fx.GraphModule)
        self.pair = replace(self.pair, student=checkpointed(self.pair.student))

    def _shard_teacher(self) -> bool:
        if not is_distributed() or not isinstance(self.pair.teacher, fx.GraphModule):
            why = "the teacher is no traced graph" if is_distributed() else "there is one process"
            self.note(f"shard_teacher has no effect: {why}")
            return False
        self.pair = replace(self.pair, teacher=sharded(self.pair.teacher, self.device))
        return True

    def note_once(self, text: str) -> None:
        if text not in self.notes:
            self.note(text)

    def cache_teacher(self, folder: Path) -> None:
        """Take the teacher's outputs from `folder` where that can be."""
        if self.recipe.feature_weight and self.pair.note is None:
            self.note("cache_teacher has no effect: the loss needs the teacher's inner features")
        elif is_distributed():
            self.note("cache_teacher has no effect: there are several processes")
        else:
            teacher = fingerprint_of(self.teacher, self.recipe.precision)
            self.cache = TeacherCache(self.pair.teacher, folder, teacher, self.note)
            self.gradient.cache = self.cache
            self.recovery.before_saving = self.cache.flush

    def train(self) -> Distilled:
        started = time.monotonic()
        compiled = self._compile()
        self.student.train()
        mean = float("nan")
        by_rows = compiled and self.device.type == "cpu" and not is_distributed()
        faster = batch_norm_by_rows(self.student) if by_rows else contextlib.nullcontext()
        keeping = kept_memory() if self.device.type == "cpu" else contextlib.nullcontext()
        with (
            faster,
            keeping,
            compiler_settings(),
            synchronized(self.student),
            collected_signals() as signalled,
        ):
            while not self._is_done():
                try:
                    mean = self._until_end(signalled)
                except _Diverged as error:
                    self.recovery.roll_back(error.inputs)
                    self.gradient.forget_recording()
                except TorchDynamoException as error:
                    compiled = self._give_up_compiling(error)
        for callback in self.callbacks:
            callback.finish()
        self._drop_compiled()
        self.student.eval()
        return Distilled(
            self.state.step,
            mean,
            self.agreement,
            time.monotonic() - started,
            compiled,
            tuple(self.notes),
        )

    def _until_end(self, signalled: list[int]) -> float:
        """Steps until the last one; raises _Diverged where a loss is not."""
        state, mean = self.state, float("nan")
        total = torch.zeros((), device=self.device)
        reported = paced = state.step
        clock = time.monotonic()
        for inputs in self._on_the_way(self.batches.between(state.step, self.total)):
            total += self._one_step(inputs)
            if self.compiling:
                self.compiling, self.compile_seconds = False, time.monotonic() - clock
                self.note(f"the first step took {self.compile_seconds:.0f} s to compile and run")
                if self.total - state.step:
                    paced, clock = state.step, time.monotonic()
            due = (
                state.step - reported >= _REPORT_STEPS
                or state.step == self.total
                or self._ends_epoch_of_early_stop()
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
            if state.opening_loss is None and math.isfinite(mean):
                state.opening_loss = mean
            if not mean <= _EXPLODED * max(state.opening_loss or 0.0, 1.0):
                raise _Diverged(self.batches.without_labels(inputs))
            seconds, steps = time.monotonic() - clock, state.step - paced
            self._report(mean, seconds / steps if steps else self.compile_seconds)
            reported = paced = state.step
            clock = time.monotonic()
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
            if self._is_done():
                break
        return mean

    def _report(self, loss: float, seconds_a_step: float) -> None:
        state = self.state
        agreement = self._measured_agreement()
        self.on_report(
            StepReport(
                step=state.step,
                steps=self.total,
                loss=loss,
                learning_rate=float(state.optimizer.param_groups[0]["lr"]),
                steps_per_second=1 / max(seconds_a_step, 1e-9),
                seconds_left=seconds_a_step * (self.total - state.step),
                agreement=agreement,
                peak_bytes=peak_memory(self.device),
                compile_seconds=self.compile_seconds,
            )
        )

    def _measured_agreement(self) -> float | None:
        """Measured where early stopping needs it, at the end, and else where it costs little."""
        if self.held_out is None:
            return None
        decides = self._ends_epoch_of_early_stop()
        last = self.state.step == self.total
        if not (decides or (is_first() and (last or self.held_out.is_affordable))):
            return None
        self.agreement = self.held_out.agreement(self.student)
        if decides and self.agreement > self.state.best_agreement:
            self.state.best_agreement, self.state.best_step = self.agreement, self.state.step
        return self.agreement

    def _ends_epoch_of_early_stop(self) -> bool:
        return (
            self.recipe.early_stop is not None
            and self.held_out is not None
            and self.state.step % self.steps_per_epoch == 0
        )

    def _is_done(self) -> bool:
        """After the last step, or where early stopping ends the run: known from the state alone."""
        state, epochs = self.state, self.recipe.early_stop
        return state.step >= self.total or (
            epochs is not None
            and self._ends_epoch_of_early_stop()
            and state.step - state.best_step >= epochs * self.steps_per_epoch
        )

    def _on_the_way(self, batches: Iterator[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
        """Copied to a GPU ahead, where each step takes whole batches there and only there."""
        if self.device.type != "cuda" or is_distributed() or self.cache is not None:
            return batches
        return ahead(batches, self.device)

    def _mixed(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        if self.recipe.mixing == "none":
            return inputs
        if self.recipe.labels or not can_mix(inputs):
            why = "a mixture has no label" if self.recipe.labels else "the inputs are not images"
            self.note_once(f"mixing has no effect: {why}")
            return inputs
        return mixed(inputs, self.recipe, self.state.step)

    def _one_step(self, inputs: tuple[Any, ...]) -> Tensor:
        state = self.state
        set_rates(
            state.optimizer, state.rate_factor * schedule(self.recipe, state.step, self.total)
        )
        for callback in self.callbacks:
            if callback.before_step(state.step, self.total):
                state.opening_loss = None
                self.gradient.forget_recording()
        inputs = self._mixed(inputs)
        if self.cache is not None:
            self.cache.expect((self.steps_per_epoch + 1) * len(inputs[0]))
        epoch, index = divmod(state.step, self.steps_per_epoch)
        with batch_named(f"batch {index} of epoch {epoch} of the data", inputs):
            loss = self.gradient(inputs)
        state.optimizer.step()
        for callback in self.callbacks:
            callback.after_step(state.step, self.total)
        state.step += 1
        return loss

    def _compile(self) -> bool:
        recipe, device = self.recipe, self.device
        if not wants_compiling(self.student, recipe, self.total, self.batches.samples, device):
            return False
        if why := why_uncompiled(recipe, device):
            self.note(why)
            return False
        self.note("compiling the student and the teacher for the first step (about a minute)")
        for module in self._compilable():
            module.compile()
        self.compiling = True
        return True

    def _compilable(self) -> list[nn.Module]:
        teacher = () if self.teacher_is_sharded else (self.pair.teacher,)
        parts = (self.pair.student, *teacher, self.pair.loss)
        return [part for part in parts if isinstance(part, nn.Module)]

    def _drop_compiled(self) -> None:
        """Undo `_compile`: in evaluation the student would be compiled again, for a few batches."""
        for module in self._compilable():
            module._compiled_call_impl = None

    def _give_up_compiling(self, error: Exception) -> bool:
        """Undo `_compile` and all steps since the last good state; False: the run is not compiled."""
        self._drop_compiled()
        self.compiling = False
        self.state.unpack(self.recovery.last_good)
        self.note(
            f"compiling failed ({short(error)}): training runs uncompiled, about half as fast"
        )
        return False
