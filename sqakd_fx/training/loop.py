"""Self-supervised quantization-aware distillation: the training loop.

The student starts from the teacher, sees the same unlabelled batches, and minimizes the distance of
its output from the teacher's. Losses stay on the device between reports, so a step costs no
synchronization. A run can be interrupted at any moment and goes on from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import TorchDynamoException

from sqakd_fx.diagnostics.batch_errors import require_finite
from sqakd_fx.engine.batch_norm_kernel import batch_norm_by_rows
from sqakd_fx.engine.compilation import compiler_settings
from sqakd_fx.engine.determinism import undisturbed_randomness
from sqakd_fx.engine.distributed import any_process, is_distributed, synchronized
from sqakd_fx.engine.kept_memory import give_back_memory, kept_memory
from sqakd_fx.engine.memory_format import store_channels_last
from sqakd_fx.engine.prefetch import ahead
from sqakd_fx.engine.signals import collected_signals
from sqakd_fx.errors import SqakdError, short
from sqakd_fx.ir.modes import set_training
from sqakd_fx.recipe.keys import Recipe
from sqakd_fx.training.beginning import Beginning, beginning_of
from sqakd_fx.training.callbacks import low_bit_callbacks
from sqakd_fx.training.decisions import Decisions, carried_out, compilable, decide
from sqakd_fx.training.ending import Ending
from sqakd_fx.training.features import TrainingPair, training_pair
from sqakd_fx.training.guard import Judged
from sqakd_fx.training.held_out import HeldOut
from sqakd_fx.training.keeping import NOTHING_KEPT, Keeping
from sqakd_fx.training.optimization import OptimizationStep
from sqakd_fx.training.optimizer import make_optimizer
from sqakd_fx.training.progress import NOBODY, Listener, Reporter
from sqakd_fx.training.state import Recovery, TrainingState
from sqakd_fx.training.step import GradientStep
from sqakd_fx.training.step_batches import StepBatches, TrainingData
from sqakd_fx.training.teacher_cache import TeacherCache, fingerprint_of

_EXPLODED = 10.0
"""Times the loss of the first step (at least 1) from which on a run has diverged."""


@dataclass(frozen=True)
class Distilled:
    """The end of a run; `loss` and `agreement` (held out, None where not measured) are the last ones.

    `before` and `after` judge the student that came in and the one that is left, on the same samples, where that was
    measured.
    """

    steps: int
    loss: float
    agreement: float | None
    seconds: float
    compiled: bool
    notes: tuple[str, ...]
    before: Judged | None = None
    after: Judged | None = None


class Interrupted(SqakdError):
    """SIGINT or SIGTERM arrived; the state is saved."""


class _Diverged(Exception):
    """The loss is not finite, or far beyond where it began; holds the last batch."""

    def __init__(self, inputs: tuple[Tensor, ...]) -> None:
        self.inputs = inputs


@dataclass(frozen=True)
class _Run:
    """The parts of a training run."""

    student: fx.GraphModule
    batches: StepBatches
    state: TrainingState
    step: OptimizationStep
    recovery: Recovery
    ending: Ending
    reporter: Reporter
    compilable: tuple[nn.Module, ...]


def distil(
    student: fx.GraphModule,
    teacher: nn.Module,
    data: TrainingData,
    recipe: Recipe,
    device: torch.device,
    keeping: Keeping = NOTHING_KEPT,
    listener: Listener = NOBODY,
) -> Distilled:
    """Train `student` (calibrated, on `device`) in place; it ends in evaluation mode. `teacher` is moved there.

    Raises:
        SourceError: the model does not take a batch.
        TrainingError: there is no data, or the loss diverges even at lower learning rates.
        Interrupted: SIGINT or SIGTERM; the state is in the folder for checkpoints.
    """
    for net in (student, teacher):
        store_channels_last(net)
    teacher.eval()
    batches = StepBatches(data, recipe, device)
    pair = training_pair(student, teacher, recipe)
    decided = decide(student, pair, batches, keeps_outputs=keeping.teacher_outputs is not None)
    reporter = Reporter(listener, batches.total, device)
    for text in decided.notes:
        reporter.note(text)
    kept = keeping.checkpoints is not None
    beginning = beginning_of(student, teacher, batches) if kept else None
    run = _prepared(student, pair, batches, decided, keeping, beginning, reporter)
    if keeping.resume and keeping.checkpoints is not None:
        run.recovery.restore_latest(batches.total)
    started = time.monotonic()
    loss, compiled = _train(run, decided.compile)
    seconds = time.monotonic() - started
    return Distilled(
        run.state.step, loss, run.ending.agreement, seconds, compiled, tuple(reporter.notes)
    )


def _prepared(
    student: fx.GraphModule,
    pair: TrainingPair,
    batches: StepBatches,
    decided: Decisions,
    keeping: Keeping,
    beginning: Beginning | None,
    reporter: Reporter,
) -> _Run:
    """All parts of a run at its first step."""
    recipe, device = batches.recipe, batches.device
    callbacks = low_bit_callbacks(
        student, recipe, batches.calibration, pair, batches.steps_per_epoch
    )
    trained = carried_out(pair, decided, device)
    state = TrainingState(student, make_optimizer(student, recipe), callbacks)
    cache = None
    if decided.cache_teacher and keeping.teacher_outputs is not None:
        fingerprint = fingerprint_of(trained.teacher, recipe.precision)
        cache = TeacherCache(trained.teacher, keeping.teacher_outputs, fingerprint, reporter.note)
    gradient = GradientStep(trained, recipe, device, reporter.note, cache)
    recovery = Recovery(
        state,
        recipe,
        keeping.checkpoints,
        device,
        beginning,
        reporter.note,
        before_saving=(lambda: None) if cache is None else cache.flush,
    )
    held_out = None
    if batches.data.held_out:
        held_out = HeldOut(batches.data.held_out, trained.teacher_output, recipe, device)
    return _Run(
        student,
        batches,
        state,
        OptimizationStep(state, gradient, batches, reporter),
        recovery,
        Ending(batches, held_out),
        reporter,
        compilable(trained, decided),
    )


def _train(run: _Run, compiled: bool) -> tuple[float, bool]:
    """All steps; the mean loss of the last report, and whether the run stayed compiled."""
    if compiled:
        for module in run.compilable:
            module.compile()
        run.reporter.awaits_compiling = True
    set_training(run.student, live_batch_norm=run.batches.recipe.batch_norm == "absorb")
    loss = float("nan")
    with _surroundings(run, compiled), collected_signals() as signalled:
        while not run.ending.is_reached(run.state):
            try:
                loss = _until_end(run, signalled)
            except _Diverged as error:
                _refuse_infinite_data(run)
                run.recovery.roll_back(error.inputs)
                run.step.gradient.forget_recording()
            except TorchDynamoException as error:
                _give_up_compiling(run, error)
                compiled = False
    for callback in run.state.callbacks:
        callback.finish()
    _drop_compiled(run)
    run.student.eval()
    return loss, compiled


def _refuse_infinite_data(run: _Run) -> None:
    """Raise SourceError where a batch since the last good state is what the loss diverged of."""
    batches = run.batches
    first, end = run.recovery.last_good.step, run.state.step
    with undisturbed_randomness():
        for step, inputs in zip(range(first, end), batches.between(first, end), strict=False):
            epoch, index = divmod(step, batches.steps_per_epoch)
            require_finite(inputs, f"batch {index} of epoch {epoch} of the data")


@contextlib.contextmanager
def _surroundings(run: _Run, compiled: bool) -> Iterator[None]:
    """What holds on this machine while a run goes on."""
    on_cpu = run.batches.device.type == "cpu"
    with contextlib.ExitStack() as stack:
        if compiled and on_cpu and not is_distributed():
            stack.enter_context(batch_norm_by_rows(run.student))
        if on_cpu:
            stack.enter_context(kept_memory())
        stack.enter_context(compiler_settings())
        stack.enter_context(synchronized(run.student))
        yield


def _until_end(run: _Run, signalled: list[int]) -> float:
    """Steps until the last one; raises _Diverged where a loss is not."""
    state, reporter, loss = run.state, run.reporter, float("nan")
    reporter.start(state.step)
    for inputs in _on_the_way(run):
        has_compiled = reporter.awaits_compiling
        reporter.add(run.step(inputs), state.step)
        if has_compiled:
            give_back_memory()
        if state.opening_loss is None:
            state.opening_loss = _finite(reporter.window(state.step).loss)
        due = (
            reporter.is_due(state.step)
            or run.ending.decides_at(state.step)
            or run.recovery.is_due_by_step()
        )
        stop = _is_stopped(run, signalled, due)
        if not (due or stop):
            continue
        window = reporter.window(state.step)
        loss = window.loss
        if not loss <= _EXPLODED * max(state.opening_loss or 0.0, 1.0):
            raise _Diverged(run.batches.without_labels(inputs))
        rate = float(state.optimizer.param_groups[0]["lr"])
        reporter.report(window, state.step, rate, run.ending.measured(state, run.student))
        run.recovery.save_if_due(force=stop or run.ending.is_reached(state))
        if stop:
            raise Interrupted(_stopped(run))
        if run.ending.is_reached(state):
            break
    return loss


def _finite(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None


def _on_the_way(run: _Run) -> Iterator[tuple[Tensor, ...]]:
    """Copied to a GPU ahead, where each step takes whole batches there and only there."""
    device = run.batches.device
    batches = run.batches.between(run.state.step, run.batches.total)
    if device.type != "cuda" or is_distributed() or run.step.gradient.cache is not None:
        return batches
    return ahead(batches, device)


def _is_stopped(run: _Run, signalled: list[int], due: bool) -> bool:
    """Whether a signal arrived; several processes agree on that where they report."""
    if due:
        return any_process(bool(signalled), run.batches.device)
    return bool(signalled) and not is_distributed()


def _stopped(run: _Run) -> str:
    saved = "the state is saved, go on with --resume" if run.recovery.saves else "nothing was saved"
    return f"stopped at step {run.state.step} of {run.batches.total}: {saved}"


def _drop_compiled(run: _Run) -> None:
    """Undo compiling: in evaluation the student would be compiled again, for a few batches."""
    for module in run.compilable:
        module._compiled_call_impl = None


def _give_up_compiling(run: _Run, error: Exception) -> None:
    """Undo compiling, and all steps since the last good state."""
    _drop_compiled(run)
    run.reporter.awaits_compiling = False
    run.state.unpack(run.recovery.last_good)
    run.reporter.note(
        f"compiling failed ({short(error)}): training runs uncompiled, about half as fast"
    )
