"""Where a run keeps what it could go on from, until it is finished."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sqakd_fx.engine.distributed import is_first
from sqakd_fx.errors import StorageError
from sqakd_fx.training.checkpoint import clear_checkpoints
from sqakd_fx.training.teacher_cache import clear_teacher_cache


@dataclass(frozen=True)
class Keeping:
    """The folders of a run.

    Attributes:
        checkpoints: a folder for checkpoints; None for none.
        teacher_outputs: a folder for what a recipe with `cache_teacher` keeps; None for none.
        resume: go on from the newest undamaged checkpoint.
    """

    checkpoints: Path | None = None
    teacher_outputs: Path | None = None
    resume: bool = False


NOTHING_KEPT = Keeping()


def kept_in(folder: Path, *, resume: bool) -> Keeping:
    """All in one folder, which is first cleared where this run is not to go on (see `require_nothing_stopped`)."""
    keeping = Keeping(_checkpoints(folder), folder / "teacher-outputs", resume)
    if not resume:
        forget(keeping)
    return keeping


def require_nothing_stopped(folder: Path) -> None:
    """Raise StorageError where checkpoints of a stopped run lie in a folder."""
    names = [path.stem for path in _checkpoints(folder).glob("step-*.safetensors")]
    step = max((int(name[5:]) for name in names if name[5:].isdecimal()), default=0)
    if step:
        raise StorageError(
            f"{folder} holds a stopped run, trained to step {step}: go on with --resume (resume=True), choose another "
            "folder with --out, or begin anew with --force (force=True), which deletes its checkpoints"
        )


def _checkpoints(folder: Path) -> Path:
    return folder / "checkpoints"


def forget(keeping: Keeping) -> None:
    """Delete all that was kept."""
    if not is_first():
        return
    if keeping.checkpoints is not None:
        clear_checkpoints(keeping.checkpoints)
    if keeping.teacher_outputs is not None:
        clear_teacher_cache(keeping.teacher_outputs)
