"""The main job: load, trace, rewrite, calibrate, distil, lower, export, validate.

Each stage is a function of its own, here or in `stages.py`; this file runs them in order and keeps the
result folder.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import fx, nn

from sqakd_fx.diagnostics.batch_errors import require_finite
from sqakd_fx.engine.determinism import (
    repeatable_arithmetic,
    seed_everything,
    undisturbed_randomness,
)
from sqakd_fx.engine.devices import choose_device
from sqakd_fx.engine.distributed import any_process, is_first, process_group
from sqakd_fx.engine.torch_settings import plain_settings
from sqakd_fx.errors import SqakdError
from sqakd_fx.exporters.profiles import Exported
from sqakd_fx.exporters.translation import Translator
from sqakd_fx.frontend.example_call import Example, arguments
from sqakd_fx.frontend.output_kinds import class_axes
from sqakd_fx.ir.pass_manager import GraphObserver, dump_into
from sqakd_fx.mixed_precision.sensitive import Relief, with_relief
from sqakd_fx.program import Program, build_program, lower, with_recipe
from sqakd_fx.recipe.keys import Recipe
from sqakd_fx.recipe.resolution import resolve_recipe
from sqakd_fx.results.answers import Answers
from sqakd_fx.results.collect import Course, make_report, write_report
from sqakd_fx.results.deploy_script import write_deploy_script
from sqakd_fx.results.evaluate import validation_batches, with_evaluation
from sqakd_fx.results.export import check_export, export
from sqakd_fx.results.folder import default_folder, held_folder, is_finished, publish, staged
from sqakd_fx.results.measure import measure
from sqakd_fx.results.other_sizes import with_other_sizes
from sqakd_fx.results.result import Result
from sqakd_fx.results.student import save_student
from sqakd_fx.results.tensors import tensor_facts
from sqakd_fx.source.inputs import TrainingInputs, source_inputs, with_samples
from sqakd_fx.source.sizes import has_example_size
from sqakd_fx.source.source import Source
from sqakd_fx.source.synthetic import DataFree
from sqakd_fx.stages import check_outputs, find_ranges, sensitive_tensors, train
from sqakd_fx.storage import storage_error, write_json
from sqakd_fx.training.keeping import Keeping, forget, kept_in, require_nothing_stopped
from sqakd_fx.training.live import Live
from sqakd_fx.training.loop import Distilled
from sqakd_fx.training.progress import Listener, StepReport
from sqakd_fx.training.tensorboard import clear_scalars, require_tensorboard, scalar_log
from sqakd_fx.validation.validate import validate


class Observer(Protocol):
    """What a front end wants to hear of a run."""

    def stage(self, name: str, detail: str = "") -> None: ...

    def progress(self, done: int, total: int) -> None: ...

    def training(self, report: StepReport) -> None: ...

    def note(self, text: str) -> None: ...


class Silent:
    """An observer that says nothing."""

    def stage(self, name: str, detail: str = "") -> None: ...

    def progress(self, done: int, total: int) -> None: ...

    def training(self, report: StepReport) -> None: ...

    def note(self, text: str) -> None: ...


# More than seven parameters: a user tells a whole run in one call, all but two by keyword.
def quantize(
    model: nn.Module,
    data: Iterable[Any],
    *,
    example_inputs: Example,
    recipe: str | Path | Mapping[str, Any] | Recipe = "speed",
    out: str | Path | None = None,
    eval_data: Iterable[Any] | None = None,
    metric: Callable[[Any, Any], float] | None = None,
    resume: bool = False,
    force: bool = False,
    observer: Observer | None = None,
    progress: bool = True,
) -> Result | None:
    """Quantize a trained float model by label-free distillation and export integer ONNX.

    Args:
        model: any traceable nn.Module; it is copied, not changed.
        data: unlabelled inputs: a DataLoader, dataset, tensor, array, or iterable of batches.
        example_inputs: a tensor, tuple or dict: one call of the model, with its batch axis.
        recipe: a goal ("speed", "size", "accuracy"), another preset ("w4a4"), a TOML file, a mapping, or a Recipe.
        out: result folder; sqakd-out/model-RECIPE where none is given.
        eval_data: (inputs, labels) batches, only to report accuracy; or inputs alone, to compare with float on.
        metric: metric(outputs, targets) in place of top-1.
        resume: go on from the last checkpoint in the folder.
        force: begin anew where a stopped run lies in the folder.
        observer: hears of the run in place of the view that `progress` shows on stderr.

    Returns the result; None in the processes of torchrun but the first, and where there is nothing to resume because
    the run in the folder is finished.

    Raises:
        SqakdError: one sentence that says what is wrong and what to do.
    """
    args, kwargs = arguments(example_inputs)
    resolved = resolve_recipe(recipe)
    folder = default_folder("model", resolved) if out is None else Path(out)
    source = Source(
        spec=type(model).__name__,
        name=folder.name,
        model=model,
        example_inputs=args,
        example_kwargs=kwargs,
        train_data=data,
        eval_data=eval_data,
        metric=metric,
    )
    if observer is not None or not progress:
        return run(source, resolved, folder, resume=resume, force=force, observer=observer)
    with Live() as live:
        return run(source, resolved, folder, resume=resume, force=force, observer=live)


@plain_settings()
def run(
    source: Source,
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    force: bool = False,
    dump: Path | None = None,
    observer: Observer | None = None,
    command: str | None = None,
) -> Result | None:
    """All stages from a loaded source to a validated result folder.

    Under torchrun every process trains on its share of each batch; the first writes, reports and has the
    result, the others have None. Nothing is done where `resume` finds a finished run.

    `command` is how a command line called it, for the report.

    A result of before stands until this one is whole. Checkpoints of a stopped run are deleted with `force` alone.

    Raises:
        SqakdError: with nothing half-written; checkpoints of an interrupted run stay for `resume`.
    """
    if not (resume or force):
        require_nothing_stopped(out)
    device = choose_device(recipe.device)
    if recipe.tensorboard:
        require_tensorboard()
    arithmetic = repeatable_arithmetic(device, recipe.tf32, recipe.deterministic)
    with process_group(device), arithmetic:
        say = (is_first() and observer) or Silent()
        if any_process(resume and is_first() and is_finished(out), device):
            say.note(f"the run in {out} is finished: without --resume it is made again")
            return None
        after = None if dump is None else dump_into(dump)
        return _held_run(_Job(source, recipe, out, device, resume, after, command), say)


def _held_run(job: _Job, say: Observer) -> Result | None:
    """All stages in the result folder, which this run holds."""
    with _held(job.out, job.resume):
        seed_everything(job.recipe.seed)
        if (job.out / "report.json").exists():
            say.note(
                f"the result in {job.out} stands until this run is finished, and is then replaced"
            )
        return _stages(job, _Journal(say))


def _held(out: Path, resume: bool) -> AbstractContextManager[None]:
    """The result folder, held by the process that writes in it."""
    return held_folder(out, resume=resume) if is_first() else nullcontext()


@dataclass(frozen=True)
class _Job:
    """What a run is to do."""

    source: Source
    recipe: Recipe
    out: Path
    device: torch.device
    resume: bool
    after: GraphObserver | None
    command: str | None


class _Journal:
    """Tells an observer what a run does, and keeps the seconds of each stage."""

    def __init__(self, observer: Observer) -> None:
        self.say = observer
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, detail: str, *, timed_as: str | None = None) -> Iterator[None]:
        """A stage of the run; where it fails, its seconds count as well."""
        started = time.perf_counter()
        self.say.stage(name, detail)
        try:
            yield
        finally:
            self.seconds[timed_as or name] = time.perf_counter() - started


def _stages(job: _Job, journal: _Journal) -> Result | None:
    for text in job.source.notes:
        journal.say.note(text)
    traced = _trace(job, journal)
    program = with_evaluation(job.source, traced, job.recipe, journal.say.note)
    for output in program.outputs:
        journal.say.note(output.sentence)
    job = _with_samples(job, journal, program)
    inputs = source_inputs(job.source, program)
    steps_per_epoch = inputs.count()
    keeping = kept_in(job.out, resume=job.resume)
    _calibrate(job, journal, program, inputs)
    program, inputs, relief = _relieve(job, journal, program, inputs)
    translator = _check(job, journal, program)
    distilled = _distil(job, journal, program, inputs, steps_per_epoch, keeping)
    if not is_first():
        return None
    program.student.cpu().eval()
    save_student(program, job.source, staged(job.out))
    lowered, exported = _export(job, journal, program, translator)
    with journal.stage("validate", "trained graph, integer program, ONNX Runtime"):
        answers = Answers(job.source, program, inputs)
        checked = validate(
            program.student,
            lowered,
            exported.path,
            answers.batches(),
            class_axes(program.outputs),
            on_answers=answers.add,
        )
        axes, graphs = class_axes(program.outputs), (program.student, lowered)
        checked = with_other_sizes(checked, graphs, exported.path, program, axes)
    journal.say.stage("report", "accuracy and speed")
    exact_products = checked.deployed.exact_products
    measured = measure(program, exported.path, answers, exact_products=exact_products)
    course = Course(journal.seconds, job.command, steps_per_epoch, relief)
    report = make_report(job.source, program, distilled, exported, checked, measured, course)
    write_report(report, staged(job.out))
    write_json(staged(job.out) / "tensors.json", _tensors(program, inputs, journal))
    publish(job.out)
    forget(keeping)
    path = job.out / exported.path.name
    return Result(job.out, program.student, lowered, path, checked, report)


def _trace(job: _Job, journal: _Journal) -> Program:
    source = job.source
    with journal.stage("trace", "torch.fx graph, BatchNorm, quantizers"):
        program = build_program(
            source.model,
            source.example_inputs,
            job.recipe,
            example_kwargs=source.example_kwargs,
            after=job.after,
        )
        require_finite(program.example, "the example")
        check_outputs(program)
    return program


def _with_samples(job: _Job, journal: _Journal, program: Program) -> _Job:
    """The job with made inputs where it asks for them."""
    wanted = job.source.train_data
    if not isinstance(wanted, DataFree):
        return job
    with journal.stage("make data", wanted.sentence):
        source = with_samples(job.source, program, wanted, job.device, journal.say.progress)
    for text in source.notes:
        journal.say.note(text)
    return replace(job, source=source)


def _calibrate(job: _Job, journal: _Journal, program: Program, inputs: TrainingInputs) -> None:
    recipe, say = job.recipe, journal.say
    wanted = recipe.calibration_batches
    seen = 0

    def on_batch(done: int) -> None:
        nonlocal seen
        seen = max(seen, done)
        say.progress(done, max(done, wanted))

    with journal.stage("calibrate", f"{wanted} batches, {recipe.initialization}"):
        program.student.to(job.device)
        find_ranges(program, inputs, job.device, on_batch=on_batch)
    if seen > wanted:
        say.note(f"ranges start from {seen} batches, not {wanted}: they have few samples")
    if inputs.batches.labels_ignored and not recipe.labels:
        say.note("the training data has labels: they are ignored")
    if inputs.undivided is not None:
        say.note(f"agreement is not measured while training (held_out): {inputs.undivided}")
    if sizes := inputs.sizes.sentence():
        say.note(sizes)


def _check(job: _Job, journal: _Journal, program: Program) -> Translator:
    with journal.stage("check", "the untrained student as integer ONNX"):
        program.student.cpu()
        translator = check_export(program)
        if job.source.eval_data is not None:
            with undisturbed_randomness():
                next(validation_batches(job.source, program, None), None)
        program.student.to(job.device)
    return translator


def _distil(
    job: _Job,
    journal: _Journal,
    program: Program,
    inputs: TrainingInputs,
    steps_per_epoch: int,
    keeping: Keeping,
) -> Distilled:
    recipe, device = job.recipe, job.device
    total = recipe.steps if recipe.steps is not None else recipe.epochs * steps_per_epoch
    labels = f"labels {recipe.labels:.0%} of the loss" if recipe.labels else "no labels"
    with (
        journal.stage("distil", f"{total} steps on {device.type}, {labels}"),
        _recorded(job, journal) as on_report,
    ):
        listener = Listener(on_report, journal.say.note, journal.say.progress)
        return train(program, inputs, steps_per_epoch, device, keeping, listener)


@contextmanager
def _recorded(job: _Job, journal: _Journal) -> Iterator[Callable[[StepReport], None]]:
    """What tells the observer of a step report, and adds it to the result folder's record of the training.

    Nothing in the processes but the first, on whose machine the folder may be.
    """
    if not is_first():
        yield lambda step: None
        return
    history, scalars = staged(job.out) / "train.jsonl", job.out / "tensorboard"
    if not job.resume:
        clear_scalars(scalars)
    with scalar_log(scalars if job.recipe.tensorboard else None) as log_scalars:

        def on_report(step: StepReport) -> None:
            journal.say.training(step)
            _append_json(history, asdict(step))
            log_scalars(step)

        yield on_report


def _export(
    job: _Job, journal: _Journal, program: Program, translator: Translator
) -> tuple[fx.GraphModule, Exported]:
    with journal.stage("export", "integer ONNX", timed_as="lower and export"):
        lowered = lower(program.student, after=job.after).graph_module
        exported = export(program, lowered, staged(job.out) / "model.onnx", translator=translator)
        write_deploy_script(program, exported.path)
        for text in exported.notes:
            journal.say.note(text)
    return lowered, exported


def _relieve(
    job: _Job, journal: _Journal, program: Program, inputs: TrainingInputs
) -> tuple[Program, TrainingInputs, Relief | None]:
    """The calibrated program, with sensitive activations in float where 8 bits cost the outputs too much."""
    relief = sensitive_tensors(program, inputs, job.device)
    if relief is None or not relief.chosen:
        return program, inputs, relief
    journal.say.note(relief.sentence(program.outputs))
    relieved = with_recipe(program, with_relief(program.recipe, relief), after=job.after)
    inputs = replace(inputs, program=relieved)
    _calibrate(replace(job, recipe=relieved.recipe), journal, relieved, inputs)
    return relieved, inputs, relief


def _tensors(program: Program, inputs: TrainingInputs, journal: _Journal) -> list[dict[str, Any]]:
    """What tensors.json holds, measured on the first batch of the training data; nothing where that cannot be had."""
    try:
        with undisturbed_randomness():
            seed_everything(program.recipe.seed)
            fitting = (batch for batch in inputs.epoch(0) if has_example_size(program, batch))
            batch = next(fitting, None)
    except SqakdError as error:
        journal.say.note(f"no histograms are recorded: {error}")
        return []
    return [] if batch is None else [asdict(one) for one in tensor_facts(program, batch)]


def _append_json(path: Path, value: Mapping[str, Any]) -> None:
    try:
        with path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(value) + "\n")
    except OSError as error:
        raise storage_error(error, path) from error
