"""The stages of a run as functions of a program, for code of the user's own between them.

    build_program ─▶ calibrate ─▶ relieve ─▶ distil, or any loop that trains program.student
                                         ─▶ lower ─▶ export ─▶ validate

Data is whatever `quantize` takes: a DataLoader, a Dataset, a tensor or array of samples, or an iterable of
batches. Labels behind the inputs are not looked at.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from sqakd_fx.diagnostics.batch_errors import require_finite
from sqakd_fx.engine.determinism import (
    repeatable_arithmetic,
    seed_everything,
    undisturbed_randomness,
)
from sqakd_fx.engine.devices import choose_device
from sqakd_fx.engine.torch_settings import plain_settings
from sqakd_fx.errors import TrainingError
from sqakd_fx.frontend.output_kinds import class_axes
from sqakd_fx.ir.batches import first_batches, last_batches
from sqakd_fx.mixed_precision.sensitive import (
    Relief,
    choose,
    measure_tensors,
    tolerances_of,
    total_work,
    with_positive_scores_as_values,
    with_relief,
)
from sqakd_fx.program import (
    Program,
    compensate_rounding,
    correct_biases,
    distillation_teacher,
    equalize_activations,
    with_recipe,
)
from sqakd_fx.quant import calibration
from sqakd_fx.quant.batch_norm import reestimate_batch_norm
from sqakd_fx.quant.input_statistics import InputStatistics, input_statistics
from sqakd_fx.quant.second_moments import second_moments
from sqakd_fx.source.batches import Loading, input_batches
from sqakd_fx.source.inputs import TrainingInputs, calibration_batches, training_inputs
from sqakd_fx.source.items import form_of
from sqakd_fx.source.sizes import require_example_size
from sqakd_fx.training import loop
from sqakd_fx.training.guard import Judge, copied_state, figures, has_lost, refuse_destroyed
from sqakd_fx.training.keeping import (
    NOTHING_KEPT,
    Keeping,
    forget,
    kept_in,
    require_nothing_stopped,
)
from sqakd_fx.training.losses import check_output_settings
from sqakd_fx.training.progress import NOBODY, Listener
from sqakd_fx.training.step_batches import TrainingData
from sqakd_fx.validation import validate as validation
from sqakd_fx.validation.verdict import Validation

_SAMPLES_AT_ONCE = 256
_BATCHES_TO_MEASURE = 2
"""The last that calibration has seen: ranges are searched on the first."""
_BATCHES_TO_JUDGE = 2
"""Of the training data, where nothing of it is held out."""


@plain_settings()
def calibrate(
    program: Program, data: Any, *, on_batch: Callable[[int], None] = lambda done: None
) -> None:
    """Give every quantizer of `program.student` its starting range, and switch it on.

    Activations are observed on the first `calibration_batches` of the recipe, in float, wherever the student
    lies. `on_batch` hears how many are done.

    Raises:
        SourceError: the data cannot be loaded, or the model does not take a batch.
        TrainingError: a weight or an activation holds NaN or infinity.
    """
    with undisturbed_randomness():
        seed_everything(program.recipe.seed)
        device = next((x.device for x in program.student.buffers()), torch.device("cpu"))
        find_ranges(program, training_inputs(data, program), device, on_batch=on_batch)


def find_ranges(
    program: Program,
    inputs: TrainingInputs,
    device: torch.device,
    *,
    on_batch: Callable[[int], None],
) -> None:
    """`calibrate` on batches that are divided already; the student lies on `device`."""
    recipe, student = program.recipe, program.student
    if recipe.equalize == "activations":
        equalize_activations(program, calibration_batches(inputs, device))
    moments = (
        second_moments(student, calibration_batches(inputs, device))
        if recipe.rounding == "compensated"
        else {}
    )
    seen: Mapping[str, InputStatistics] = {}
    if recipe.bias_correction and recipe.initialization != "output":
        seen = input_statistics(student, calibration_batches(inputs, device))
    found = calibration.calibrate(
        student,
        calibration_batches(inputs, device),
        method=recipe.initialization,
        on_batch=on_batch,
    )
    before = compensate_rounding(student, moments) if moments else {}
    if recipe.bias_correction:
        read = found or seen
        correct_biases(student, {name: one.mean for name, one in read.items()}, before)


@plain_settings()
def relieve(program: Program, data: Any) -> tuple[Program, Relief | None]:
    """The calibrated program, or one in which activations stay in float that cost an output too much at 8 bits.

    It is what `quantize` does behind `calibrate`, by the recipe's keys `sensitive`, `tolerance` and `tolerance_work`.
    The program that comes back is calibrated; it is the given one where nothing has to be in float. The second value
    says what was measured and chosen, and is None where the recipe leaves the search out.

    Raises:
        TrainingError: the student is not calibrated. SourceError: the data cannot be loaded.
    """
    if not program.is_calibrated:
        raise TrainingError("the student is not calibrated: call calibrate(program, data) first")
    with undisturbed_randomness():
        seed_everything(program.recipe.seed)
        device = next((x.device for x in program.student.buffers()), torch.device("cpu"))
        inputs = training_inputs(data, program)
        relief = sensitive_tensors(program, inputs, device)
        if relief is None or not relief.chosen:
            return program, relief
        relieved = with_recipe(program, with_relief(program.recipe, relief))
        relieved.student.to(device)
        inputs = replace(inputs, program=relieved)
        find_ranges(relieved, inputs, device, on_batch=lambda done: None)
        return relieved, relief


def sensitive_tensors(
    program: Program, inputs: TrainingInputs, device: torch.device
) -> Relief | None:
    """What 8-bit activations cost the outputs, and which are to be in float; None where the recipe does not ask."""
    recipe = program.recipe
    if recipe.sensitive == "off":
        return None
    last = last_batches(calibration_batches(inputs, device), _BATCHES_TO_MEASURE)
    tensors = measure_tensors(program.student, last)
    outputs = with_positive_scores_as_values(program.outputs, program.student, last)
    tolerances = tolerances_of(recipe, outputs)
    return choose(tensors, tolerances, recipe.tolerance_work, total_work(program.student))


@plain_settings()
def distil(
    program: Program,
    data: Any,
    *,
    folder: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    listener: Listener = NOBODY,
) -> loop.Distilled:
    """Train the calibrated student in place on the teacher's outputs, as the program's recipe says.

    It ends on the CPU in evaluation mode. As in `quantize`, a part of the data (`held_out`) may be kept back to
    measure agreement on. `folder` is for checkpoints: `resume` goes on from them, `force` deletes those of a stopped
    run. `listener` hears of the steps.

    Raises:
        TrainingError: the student is not calibrated, or the loss diverges even at lower learning rates.
        SourceError: the data cannot be loaded, or the model does not take a batch.
        StorageError: the folder holds a stopped run, and neither `resume` nor `force` is given.
        Interrupted: SIGINT or SIGTERM; the state is saved where there is a folder.
    """
    recipe = program.recipe
    if not program.is_calibrated:
        raise TrainingError("the student is not calibrated: call calibrate(program, data) first")
    check_outputs(program)
    device = choose_device(recipe.device)
    inputs = training_inputs(data, program)
    if folder is not None and not (resume or force):
        require_nothing_stopped(Path(folder))
    keeping = NOTHING_KEPT if folder is None else kept_in(Path(folder), resume=resume)
    arithmetic = repeatable_arithmetic(device, recipe.tf32, recipe.deterministic)
    with undisturbed_randomness(), arithmetic:
        steps_per_epoch = inputs.count()
        program.student.to(device)
        try:
            distilled = train(program, inputs, steps_per_epoch, device, keeping, listener)
        finally:
            program.student.cpu().eval()
    forget(keeping)
    return distilled


def check_outputs(program: Program) -> None:
    """Raises RecipeError where the recipe's losses do not fit the model's outputs."""
    with torch.no_grad():
        names = [one.name for one in program.outputs]
        check_output_settings(program.recipe, program.teacher(*program.example), names)


def train(
    program: Program,
    inputs: TrainingInputs,
    steps_per_epoch: int,
    device: torch.device,
    keeping: Keeping,
    listener: Listener,
) -> loop.Distilled:
    """`distil` on batches that are divided already; the student lies on `device` and stays there."""
    student, recipe = program.student, program.recipe
    teacher = distillation_teacher(program).to(device)
    held_out = inputs.held_out()
    judge = Judge(held_out or _first_samples(inputs, device), teacher, recipe, device)
    before, calibrated = judge(student), copied_state(student)
    distilled = loop.distil(
        student,
        teacher,
        TrainingData(inputs.training, steps_per_epoch, held_out),
        recipe,
        device,
        keeping,
        listener,
    )
    if count := recipe.reestimate_batch_norm:
        reestimate_batch_norm(student, itertools.islice(inputs.epoch(0), count), device)
    after = judge(student)
    refuse_destroyed(before, after, recipe)
    if recipe.labels or not has_lost(before, after):
        return replace(distilled, before=before, after=after)
    student.load_state_dict(calibrated)
    note = f"training lost, the calibrated student is kept: {figures(before, after)}"
    listener.on_note(note)
    measured = None if distilled.agreement is None else before.agreement
    notes = (*distilled.notes, note)
    return replace(distilled, agreement=measured, before=before, after=before, notes=notes)


def _first_samples(inputs: TrainingInputs, device: torch.device) -> list[tuple[Tensor, ...]]:
    """What data that could not be divided is judged on: the first batches that calibration has seen."""
    with undisturbed_randomness():
        seed_everything(inputs.program.recipe.seed)
        return list(first_batches(calibration_batches(inputs, device), _BATCHES_TO_JUDGE))


def validate(program: Program, lowered: fx.GraphModule, path: str | Path, data: Any) -> Validation:
    """Hold an exported file against the trained student and its integer program, code by code, on all of `data`.

    `failures` of what comes back is empty where the file computes what was trained.

    Raises:
        ParityError: the runtime refuses the file.
        SourceError: the data cannot be loaded, or the model does not take a batch.
    """
    return validation.validate(
        program.student,
        lowered,
        Path(path),
        _in_order(program, data),
        class_axes(program.outputs),
    )


def _in_order(program: Program, data: Any) -> Iterator[tuple[Tensor, ...]]:
    call = program.traced.call
    loading = Loading(_SAMPLES_AT_ONCE, drop_last=False)
    batches = input_batches(data, form_of(call), loading, what="data to validate on")
    for index, batch in enumerate(batches):
        inputs = call.flatten(batch.args, batch.kwargs)
        require_finite(inputs, f"batch {index} of the data to validate on")
        require_example_size(program, inputs, "data to validate on")
        yield inputs
