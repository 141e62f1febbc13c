"""The main job: load, trace, rewrite, calibrate, distil, lower, export, validate.

Each stage is a function of its own in the module of its name; this file runs them in order and
keeps the result folder.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import fx, nn

from sqakd_fx.engine.determinism import repeatable_arithmetic, seed_everything
from sqakd_fx.engine.distributed import is_first, process_group
from sqakd_fx.errors import RecipeError
from sqakd_fx.program import build_program, distillation_teacher, layer_facts, lower
from sqakd_fx.quant.batch_norm import reestimate_batch_norm
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.recipe import Recipe, resolve_recipe
from sqakd_fx.results import markdown as reporting
from sqakd_fx.results.collect import make_report
from sqakd_fx.results.evaluate import validation_batches
from sqakd_fx.results.export import check_export, export_onnx
from sqakd_fx.results.student import save_student
from sqakd_fx.source.inputs import calibration_batches, training_inputs
from sqakd_fx.source.source import Source
from sqakd_fx.storage import (
    claim_output_folder,
    remove_temporaries,
    storage_error,
    write_json,
    write_text,
)
from sqakd_fx.training.checkpoint import clear_checkpoints
from sqakd_fx.training.loop import distil
from sqakd_fx.training.losses import check_output_settings
from sqakd_fx.training.progress import StepReport
from sqakd_fx.training.teacher_cache import clear_teacher_cache
from sqakd_fx.training.tensorboard import clear_scalars, require_tensorboard, scalar_log
from sqakd_fx.validation.validate import Validation, validate


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


@dataclass(frozen=True)
class Result:
    """A finished run: the trained student, the integer program, the files and the figures."""

    out: Path
    student: fx.GraphModule
    lowered: fx.GraphModule
    model_path: Path
    validation: Validation
    report: Mapping[str, Any]


def quantize(
    model: nn.Module,
    data: Iterable[Any],
    *,
    example_inputs: Any,
    recipe: str | Path | Mapping[str, Any] | Recipe = "w4a4",
    out: str | Path = "sqakd-out/model",
    eval_data: Iterable[Any] | None = None,
    metric: Callable[[Any, Any], float] | None = None,
    resume: bool = False,
    observer: Observer | None = None,
) -> Result | None:
    """Quantize a trained float model by label-free distillation and export integer ONNX.

    Args:
        model: any traceable nn.Module; it is copied, not changed.
        data: unlabelled inputs: a DataLoader, dataset, tensor, array, or iterable of batches.
        example_inputs: a tensor, tuple or dict: one call of the model, with its batch axis.
        recipe: a preset ("w4a4"), a TOML file, a mapping, or a Recipe.
        out: result folder.
        eval_data: labelled batches, only to report accuracy.
        metric: metric(outputs, targets) in place of top-1.

    Returns the result; None in the processes of torchrun but the first.

    Raises:
        SqakdError: one sentence that says what is wrong and what to do.
    """
    args, kwargs = _as_call(example_inputs)
    source = Source(
        spec=type(model).__name__,
        name=Path(out).name,
        model=model.eval(),
        example_inputs=args,
        example_kwargs=kwargs,
        train_data=data,
        eval_data=eval_data,
        metric=metric,
    )
    return run(source, resolve_recipe(recipe), Path(out), resume=resume, observer=observer)


def _as_call(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example) if isinstance(example, tuple | list) else (example,)), {}


def choose_device(wanted: str) -> torch.device:
    """ "auto" takes the GPU where there is one; raises RecipeError for a GPU that is not there."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise RecipeError(
            "--device cuda: torch sees no GPU here: use --device cpu, or see `sqakd-fx doctor`"
        )
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(wanted)


def run(
    source: Source,
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    dump: Path | None = None,
    observer: Observer | None = None,
) -> Result | None:
    """All stages from a loaded source to a validated result folder.

    Under torchrun every process trains on its share of each batch; the first writes, reports and has the
    result, the others have None.

    Raises:
        SqakdError: with nothing half-written; checkpoints of an interrupted run stay for `resume`.
    """
    device = choose_device(recipe.device)
    if recipe.tensorboard:
        require_tensorboard()
    arithmetic = repeatable_arithmetic(device, recipe.tf32, recipe.deterministic)
    with process_group(device), arithmetic:
        return _run(source, recipe, out, device, resume, dump, observer if is_first() else None)


def _run(
    source: Source,
    recipe: Recipe,
    out: Path,
    device: torch.device,
    resume: bool,
    dump: Path | None,
    observer: Observer | None,
) -> Result | None:
    say = observer or Silent()
    if is_first():
        claim_output_folder(out)
        remove_temporaries(out)
    seed_everything(recipe.seed)
    timings: dict[str, float] = {}

    with _timed(timings, "trace"):
        say.stage("trace", "torch.fx graph, BatchNorm, quantizers")
        program = build_program(
            source.model, source.example_inputs, source.example_kwargs, recipe, dump=dump
        )
        with torch.no_grad():
            check_output_settings(recipe, program.teacher(*program.example))
    inputs = training_inputs(source, program, recipe)
    per_epoch = inputs.count()
    if not resume and is_first():
        clear_checkpoints(out / "checkpoints")
        clear_teacher_cache(out / "teacher-outputs")

    with _timed(timings, "calibrate"):
        say.stage("calibrate", f"{recipe.calibration_batches} batches, {recipe.initialization}")
        program.student.to(device)
        calibrate(
            program.student,
            calibration_batches(inputs, recipe, device),
            method=recipe.initialization,
            on_batch=lambda done: say.progress(done, recipe.calibration_batches),
        )
    if inputs.batches.labels_ignored and not recipe.labels:
        say.note("the training data has labels: they are ignored")
    if inputs.undivided is not None:
        say.note(f"agreement is not measured while training (held_out): {inputs.undivided}")

    with _timed(timings, "check"):
        say.stage("check", "the untrained student as integer ONNX")
        program.student.cpu()
        check_export(program, recipe)
        program.student.to(device)

    teacher = distillation_teacher(program)
    with _timed(timings, "distil"):
        total = recipe.steps if recipe.steps is not None else recipe.epochs * per_epoch
        labels = f"labels {recipe.labels:.0%} of the loss" if recipe.labels else "no labels"
        say.stage("distil", f"{total} steps on {device.type}, {labels}")
        history = out / "train.jsonl"
        scalars = out / "tensorboard"
        if not resume and is_first():
            history.unlink(missing_ok=True)
            clear_scalars(scalars)

        with scalar_log(scalars if recipe.tensorboard and is_first() else None) as log_scalars:

            def on_report(step: StepReport) -> None:
                if not is_first():
                    return
                say.training(step)
                _append_json(history, asdict(step))
                log_scalars(step)

            distilled = distil(
                program.student,
                teacher,
                inputs.training,
                recipe,
                steps_per_epoch=per_epoch,
                device=device,
                held_out=inputs.held_out(),
                checkpoints=out / "checkpoints",
                teacher_outputs=out / "teacher-outputs",
                resume=resume,
                on_report=on_report,
                on_note=say.note,
            )
        if recipe.reestimate_batch_norm:
            reestimate_batch_norm(
                program.student,
                itertools.islice(inputs.epoch(0), recipe.reestimate_batch_norm),
                device,
            )
    if not is_first():
        return None
    program.student.cpu().eval()
    save_student(program, source, recipe, out)

    with _timed(timings, "lower and export"):
        say.stage("export", "integer ONNX")
        lowered = lower(program.student).graph_module
        model_path = out / "model.onnx"
        exported = export_onnx(lowered, program, recipe, model_path)
        for text in exported.notes:
            say.note(text)

    with _timed(timings, "validate"):
        say.stage("validate", "trained graph, integer program, ONNX Runtime")
        checked = validate(
            program.student, lowered, model_path, validation_batches(source, program, inputs)
        )
    say.stage("report", "accuracy and speed")
    report = make_report(
        source, program, recipe, checked, exported, timings, distilled.notes, distilled.loss
    )
    write_json(out / "report.json", report)
    text = reporting.markdown(report, layer_facts(program.student), program.notes)
    write_text(out / "report.md", text)
    clear_checkpoints(out / "checkpoints")
    clear_teacher_cache(out / "teacher-outputs")
    return Result(out, program.student, lowered, model_path, checked, report)


def _append_json(path: Path, value: Mapping[str, Any]) -> None:
    try:
        with path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(value) + "\n")
    except OSError as error:
        raise storage_error(error, path) from error


class _timed:
    """Adds the seconds of a block to a table."""

    def __init__(self, table: dict[str, float], name: str) -> None:
        self.table, self.name = table, name

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.table[self.name] = time.perf_counter() - self.started
