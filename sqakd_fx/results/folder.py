"""A result folder: one run at a time, and a finished result that is replaced as a whole.

    NAME/                      the finished result; checkpoints/ of a run that goes on
    NAME/.new/                 what the present run has written so far
    NAME/.done/                `.new`, renamed when the run is finished: its files take their places

The rename is the moment from which the new result holds. A process that dies behind it leaves `.done`, and whoever
reads the folder next moves the rest.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from sqakd_fx.errors import StorageError
from sqakd_fx.recipe.keys import Recipe
from sqakd_fx.results.file_names import made_of_a_result
from sqakd_fx.storage import (
    claim_output_folder,
    read_json,
    remove_temporaries,
    storage_error,
    write_json,
)

_NEW, _DONE, _LOCK = ".new", ".done", ".lock"
_NAMES = ".names"
"""In `.done`: the names of all files of the result."""
_held: set[Path] = set()
"""Folders of runs in this process: a process does not lock a file against itself."""


def default_folder(name: str, recipe: Recipe) -> Path:
    """sqakd-out/NAME-w4a4: a folder of its own for each model and recipe."""
    bits = f"w{recipe.weight_bits}a{recipe.activation_bits}"
    told = recipe.name if bits in recipe.name else f"{recipe.name}-{bits}"
    return Path("sqakd-out") / f"{_plain(name)}-{_plain(told)}"


def _plain(text: str) -> str:
    """Part of a folder's name, on any system."""
    return re.sub(r"[^\w.+-]", "-", text)[:80]


@contextmanager
def held_folder(out: Path, *, resume: bool) -> Iterator[None]:
    """The folder, made and marked as ours, held against other runs and cleared of what dead ones left.

    Raises:
        StorageError: another run holds it, it is somebody else's, or it cannot be made.
    """
    claim_output_folder(out)
    key = out.resolve()
    try:
        if (out / _LOCK).is_symlink():
            (out / _LOCK).unlink()
        handle = (out / _LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise storage_error(error, out / _LOCK) from error
    with handle:
        if key in _held or not _locked(handle):
            raise StorageError(
                f"another run writes to {out} (process {_holder(handle)}): wait for its end, or choose another --out"
            )
        _held.add(key)
        try:
            handle.truncate(0)
            handle.write(f"{os.getpid()}\n")
            handle.flush()
            settle(out)
            remove_temporaries(out)
            if not resume:
                _remove(out / _NEW)
            staged(out)
            yield
        finally:
            _held.discard(key)


def _locked(handle: IO[str]) -> bool:
    """Whether this process got the lock, which ends with the process at the latest."""
    try:
        if os.name == "nt":
            import msvcrt

            handle.seek(0)
            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _holder(handle: IO[str]) -> str:
    with suppress(OSError):
        handle.seek(0)
        return handle.read(20).strip() or "unknown"
    return "unknown"


def staged(out: Path) -> Path:
    """Where the present run writes its result."""
    folder = out / _NEW
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise storage_error(error, folder) from error
    return folder


def publish(out: Path) -> None:
    """Put the present run's result in the place of the one before, whose files that it has not are deleted.

    Raises:
        StorageError: the folder cannot be written.
    """
    names = sorted(path.name for path in staged(out).iterdir())
    write_json(out / _NEW / _NAMES, names)
    try:
        _remove(out / _DONE)
        os.replace(out / _NEW, out / _DONE)
    except OSError as error:
        raise storage_error(error, out) from error
    settle(out)


def settle(out: Path) -> None:
    """Finish what `publish` began, if a process died meanwhile.

    Raises:
        StorageError: the folder cannot be written.
    """
    done = out / _DONE
    if done.is_symlink() or not done.is_dir():
        return
    try:
        names = {str(name) for name in _list_in(done / _NAMES)}
        for name in made_of_a_result() - names:
            (out / name).unlink(missing_ok=True)
        for path in sorted(done.iterdir()):
            if path.name != _NAMES:
                with suppress(FileNotFoundError):
                    os.replace(path, out / path.name)
        _remove(done)
    except OSError as error:
        raise storage_error(error, out) from error


def _list_in(path: Path) -> list[Any]:
    found = read_json(path)
    if not isinstance(found, list):
        raise StorageError(f"{path} is damaged: delete the folder {path.parent}")
    return found


def is_finished(out: Path) -> bool:
    """Whether the folder holds a result and no run that could go on."""
    running = (out / _NEW).exists() or any((out / "checkpoints").glob("step-*"))
    return (out / "report.json").is_file() and not running


def _remove(folder: Path) -> None:
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)
