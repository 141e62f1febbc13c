"""The main job: load, trace, rewrite, calibrate, distil, lower, export, validate.

Each stage is a function of its own in the module of its name; this file runs them in order and
keeps the result folder.
"""

from __future__ import annotations

import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn

from sqakd_fx import report as reporting
from sqakd_fx.batches import Batch, Batches, input_batches, labelled_batches, replayable
from sqakd_fx.calibrate import calibrate, quantizers_of
from sqakd_fx.checkpoint import clear_checkpoints
from sqakd_fx.compiler import tensors_of
from sqakd_fx.distil import distil
from sqakd_fx.distributed import is_first, process_group
from sqakd_fx.errors import RecipeError, SourceError, SqakdError, StorageError
from sqakd_fx.exporters.profiles import Export, Exported, write_profile
from sqakd_fx.held_out import split_data
from sqakd_fx.losses import check_output_settings, class_axis
from sqakd_fx.program import (
    Program,
    build_program,
    distillation_teacher,
    enable_quantizers,
    layer_facts,
    lower,
)
from sqakd_fx.progress import StepReport
from sqakd_fx.randomness import seed_everything, undisturbed_randomness
from sqakd_fx.recipe import Recipe, resolve_recipe, to_toml
from sqakd_fx.runtime import latency, session
from sqakd_fx.scalars import clear_scalars, require_tensorboard, scalar_log
from sqakd_fx.source import Source
from sqakd_fx.storage import (
    claim_output_folder,
    read_json,
    remove_temporaries,
    storage_error,
    write_atomically,
    write_json,
    write_text,
)
from sqakd_fx.teacher_cache import clear_teacher_cache
from sqakd_fx.validate import Validation, validate

_VALIDATION_SAMPLES = 512


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


@dataclass(frozen=True)
class _Inputs:
    """The user's training data as tuples in the order of the graph's inputs."""

    batches: Batches[Batch]
    labelled: Batches[tuple[Batch, Any]] | None
    kept_back: Batches[Batch] | None
    undivided: str | None
    seed: int
    program: Program

    def epoch(self, number: int) -> Iterator[tuple[Any, ...]]:
        self.batches.set_epoch(number)
        for batch in self.batches:
            yield self._flat(batch)

    def training(self, number: int) -> Iterator[tuple[Any, ...]]:
        """The batches of `epoch`, with the labels behind the inputs where the recipe trains on them."""
        if self.labelled is None:
            yield from self.epoch(number)
            return
        self.labelled.set_epoch(number)
        for batch, target in self.labelled:
            yield (*self._flat(batch), torch.as_tensor(target))

    def held_out(self) -> list[tuple[Any, ...]]:
        """Batches that no epoch has, the same in every run; none where `undivided` says why."""
        with undisturbed_randomness():
            seed_everything(self.seed)
            return [self._flat(batch) for batch in self.kept_back or ()]

    def count(self) -> int:
        known = self.batches.length()
        return known if known else sum(1 for _ in self.batches)

    def _flat(self, batch: Batch) -> tuple[Any, ...]:
        return self.program.traced.call.flatten(batch.args, batch.kwargs)


def training_inputs(source: Source, program: Program, recipe: Recipe) -> _Inputs:
    """Batches of unlabelled inputs; raises SourceError where there is no data."""
    if source.train_data is None:
        raise SourceError(f"{source.spec} gives no training data: add train_data() or use --data")
    split = split_data(replayable(source.train_data), recipe.held_out)
    form: dict[str, Any] = {
        "n_inputs": source.n_inputs,
        "input_names": source.input_names,
        "batch_size": recipe.batch_size,
        "seed": recipe.seed,
        "example_ndim": source.example_ndim,
    }
    return _Inputs(
        input_batches(split.training, shuffle=True, **form),
        labelled_batches(split.training, shuffle=True, drop_last=True, what="training data", **form)
        if recipe.labels
        else None,
        None if split.held_out is None else input_batches(split.held_out, shuffle=False, **form),
        split.reason,
        recipe.seed,
        program,
    )


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
    with process_group(device):
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
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = recipe.tf32
    torch.use_deterministic_algorithms(device.type == "cpu", warn_only=True)
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
        say.stage("calibrate", f"{recipe.calibration_batches} batches, {recipe.initialisation}")
        program.student.to(device)
        calibrate(
            program.student,
            _calibration(inputs, recipe, device),
            method=recipe.initialisation,
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

    teacher = distillation_teacher(program).to(device)
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


def _calibration(
    inputs: _Inputs, recipe: Recipe, device: torch.device
) -> Iterator[tuple[Any, ...]]:
    for index, batch in enumerate(itertools.islice(inputs.epoch(0), recipe.calibration_batches)):
        bad = any(
            isinstance(x, Tensor) and x.is_floating_point() and not bool(torch.isfinite(x).all())
            for x in batch
        )
        if bad:
            raise SourceError(f"batch {index} of the data holds NaN or infinity: clean the data")
        yield tuple(x.to(device) if isinstance(x, Tensor) else x for x in batch)


@torch.no_grad()
def reestimate_batch_norm(
    student: fx.GraphModule, batches: Iterable[tuple[Any, ...]], device: torch.device
) -> None:
    """Take BatchNorm statistics again, as plain averages over `batches`."""
    norms = [m for m in student.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    student.train()
    for inputs in batches:
        student(*(x.to(device) if isinstance(x, Tensor) else x for x in inputs))
    student.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


# -- the student on disk -----------------------------------------------------------------------


def save_student(program: Program, source: Source, recipe: Recipe, out: Path) -> None:
    """student.safetensors, program.json and recipe.toml: enough to rebuild it from the source."""
    state = {
        k: v.detach().cpu().contiguous().clone() for k, v in program.student.state_dict().items()
    }
    write_atomically(out / "student.safetensors", lambda path: save_file(state, path))
    write_text(out / "recipe.toml", to_toml(recipe))
    write_json(
        out / "program.json",
        {
            "source": source.spec,
            "version": version("sqakd-fx"),
            "inputs": list(program.input_names),
            "quantizers": {
                name: {"family": q.family.name, "role": q.role, "bits": q.bits}
                for name, q in quantizers_of(program.student).items()
            },
            "notes": [asdict(note) for note in program.notes],
            "log": reporting.log_as_json(program.log),
        },
    )


def load_student(out: Path, source: Source) -> tuple[Program, Recipe]:
    """Rebuild the trained student of a result folder.

    Raises:
        StorageError: the folder lacks a file. SourceError: the source is no longer the same model.
    """
    read_json(out / "program.json")
    recipe = resolve_recipe(out / "recipe.toml")
    program = build_program(source.model, source.example_inputs, source.example_kwargs, recipe)
    path = out / "student.safetensors"
    try:
        state = load_file(path)
    except Exception as error:
        raise StorageError(
            f"{path} is missing or damaged: run `sqakd-fx quantize` again"
        ) from error
    try:
        program.student.load_state_dict(state)
    except RuntimeError as error:
        raise SourceError(
            f"the student in {out} does not fit the model of {source.spec}: was the model changed?"
        ) from error
    enable_quantizers(program.student)
    program.student.eval()
    return program, recipe


def export_job(lowered: fx.GraphModule, program: Program, recipe: Recipe) -> Export:
    """What the exporters need to know of a lowered student."""
    return Export(
        lowered,
        distillation_teacher(program),
        program.example,
        recipe.opset,
        {
            "sqakd_fx.version": version("sqakd-fx"),
            "sqakd_fx.recipe": recipe.name,
            "sqakd_fx.bits": f"w{recipe.weight_bits}a{recipe.activation_bits}",
            "sqakd_fx.family": f"{recipe.weight_family}/{recipe.activation_family}",
        },
    )


def export_onnx(lowered: fx.GraphModule, program: Program, recipe: Recipe, path: Path) -> Exported:
    """Write the integer program in the recipe's profile; raises ExportError or StorageError."""
    return write_profile(recipe.profile, export_job(lowered, program, recipe), path)


def check_export(program: Program, recipe: Recipe) -> None:
    """Export the calibrated student and let it go, so that what has no ONNX form is known before training.

    Raises:
        PassError; ExportError, also where ONNX Runtime refuses the model.
    """
    with undisturbed_randomness(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(lower(program.student).graph_module, program, recipe, path)


def validation_batches(
    source: Source, program: Program, inputs: _Inputs | None
) -> Iterator[tuple[Tensor, ...]]:
    """Evaluation inputs where there are any, else training inputs; at most 512 samples of those."""
    seen = 0
    if source.eval_data is not None:
        for batch, _ in _evaluation(source):
            yield program.traced.call.flatten(batch.args, batch.kwargs)
        return
    if inputs is None:
        return
    for ready in inputs.epoch(0):
        yield ready
        seen += len(ready[0])
        if seen >= _VALIDATION_SAMPLES:
            return


def _evaluation(source: Source) -> Iterable[tuple[Batch, Any]]:
    assert source.eval_data is not None
    return labelled_batches(
        source.eval_data,
        n_inputs=source.n_inputs,
        input_names=source.input_names,
        batch_size=256,
        example_ndim=source.example_ndim,
    )


def evaluate(
    source: Source, program: Program, functions: Mapping[str, Callable[..., Any]]
) -> dict[str, float] | None:
    """Top-1 in percent, or the user's metric, of several functions over the same labelled data."""
    if source.eval_data is None:
        return None
    outputs: dict[str, list[Tensor]] = {name: [] for name in functions}
    targets: list[Tensor] = []
    for batch, target in _evaluation(source):
        inputs = program.traced.call.flatten(batch.args, batch.kwargs)
        targets.append(torch.as_tensor(target))
        for name, function in functions.items():
            with torch.no_grad():
                outputs[name].append(tensors_of(function(*inputs))[0].cpu())
    wanted = torch.cat(targets)
    metric = source.metric or _top1
    return {name: float(metric(torch.cat(parts), wanted)) for name, parts in outputs.items()}


def _top1(output: Tensor, target: Tensor) -> float:
    axis = class_axis(tuple(output.shape))
    return 100 * float((output.argmax(dim=1 if axis is None else axis) == target).float().mean())


def make_report(
    source: Source,
    program: Program,
    recipe: Recipe,
    checked: Validation,
    exported: Exported,
    timings: Mapping[str, float],
    training_notes: Iterable[str],
    loss: float,
) -> dict[str, Any]:
    """Everything the result table shows: sizes, accuracy, speed, validation, timings."""
    model_path = exported.path
    running = session(model_path)
    names = [i.name for i in running.get_inputs()]

    def integer_onnx(*inputs: Tensor) -> list[Tensor]:
        feeds = {n: x.numpy() for n, x in zip(names, inputs, strict=True)}
        return [torch.from_numpy(y) for y in running.run(None, feeds)]

    accuracy = evaluate(
        source,
        program,
        {"float": program.teacher, "student": program.student, "onnx": integer_onnx},
    )
    example = program.example
    with tempfile.TemporaryDirectory() as folder:
        float_path = Path(folder) / "float.onnx"
        float_bytes, float_ms = None, None
        try:
            write_profile("float", export_job(program.student, program, recipe), float_path)
            float_bytes = float_path.stat().st_size
            float_ms = latency(float_path, example)
        except SqakdError:
            pass
    integer_ms = latency(model_path, example)
    weights = sum(p.numel() for p in program.teacher.parameters())
    facts = layer_facts(program.student)
    coded = sum(f.parameters for f in facts)
    packed = sum(f.weight_bytes for f in facts) + 4 * max(weights - coded, 0)
    metric = "metric" if source.metric else "top-1 (%)"
    summary: list[tuple[str, str, str]] = []
    if accuracy is not None:
        summary.append((metric, f"{accuracy['float']:.2f}", f"{accuracy['onnx']:.2f} (ONNX)"))
        summary.append(
            (f"{metric}, PyTorch", f"{accuracy['float']:.2f}", f"{accuracy['student']:.2f}")
        )
    full = next(r for r in checked.runtimes if r.optimisation == "full")
    summary += [
        ("same prediction as the trained graph", "", f"{full.agreement:.2%}"),
        ("ONNX file", _kib(float_bytes), _kib(model_path.stat().st_size)),
        ("weights at their nominal bits", _kib(4 * weights), _kib(packed)),
        (
            f"ms a call, batch {len(example[0])}, 1 thread",
            "–" if float_ms is None else f"{float_ms:.3f}",
            f"{integer_ms:.3f}" + (f" ({float_ms / integer_ms:.1f}x)" if float_ms else ""),
        ),
    ]
    return {
        "name": source.name,
        "source": source.spec,
        "recipe": recipe.name,
        "version": version("sqakd-fx"),
        "torch": torch.__version__,
        "summary": summary,
        "accuracy": accuracy,
        "float_onnx_bytes": float_bytes,
        "onnx_bytes": model_path.stat().st_size,
        "nominal_weight_bytes": packed,
        "float_ms": float_ms,
        "integer_ms": integer_ms,
        "loss": loss,
        "seconds": dict(timings),
        "training_notes": list(training_notes),
        "layers": [asdict(f) for f in facts],
        "stored_weights": [asdict(w) for w in exported.weights],
        "export_notes": list(exported.notes),
        "stays_in_float": [asdict(n) for n in program.notes],
        "validation": checked.as_dict(),
        "validation_lines": reporting.validation_lines(checked),
    }


def _kib(size: float | None) -> str:
    return "–" if size is None else f"{size / 1024:.0f} KiB"
