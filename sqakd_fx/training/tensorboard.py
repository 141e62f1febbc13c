"""Figures of a training run for TensorBoard, an optional package."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqakd_fx.errors import RecipeError
from sqakd_fx.storage import storage_error
from sqakd_fx.training.progress import StepReport


def require_tensorboard() -> None:
    """Raises RecipeError where the package is not installed or too old for torch."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise RecipeError(
            f"tensorboard = true needs the package tensorboard ({error}): "
            "pip install 'sqakd-fx[tensorboard]', or leave the key out"
        ) from None


def clear_scalars(folder: Path) -> None:
    """Delete the event files of an earlier run."""
    for path in folder.glob("events.out.tfevents.*"):
        path.unlink()


@contextmanager
def scalar_log(folder: Path | None) -> Iterator[Callable[[StepReport], None]]:
    """A function that writes a report's figures into an event file in `folder`; None: it does nothing.

    Of a run that goes on from a checkpoint, or goes back, what an earlier event file says of the same and
    later steps is hidden.

    Raises:
        StorageError: a file cannot be written.
    """
    if folder is None:
        yield lambda report: None
        return
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = None
    last = 0

    def write(report: StepReport) -> None:
        nonlocal writer, last
        try:
            if writer is None or report.step <= last:
                if writer is not None:
                    writer.close()
                writer = SummaryWriter(folder, purge_step=report.step)  # type: ignore[no-untyped-call]
            last = report.step
            for name, value in figures(report).items():
                writer.add_scalar(name, value, report.step)
            writer.flush()
        except OSError as error:
            raise storage_error(error, folder) from error

    try:
        yield write
    finally:
        if writer is not None:
            writer.close()


def figures(report: StepReport) -> dict[str, float]:
    """The scalars of a report by name; agreement only where it was measured."""
    values = {
        "loss": report.loss,
        "learning_rate": report.learning_rate,
        "steps_per_second": report.steps_per_second,
    }
    return values if report.agreement is None else values | {"agreement": report.agreement}
