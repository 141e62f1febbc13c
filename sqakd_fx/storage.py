"""Writing files so that nothing half-written ever stands under its final name."""

from __future__ import annotations

import errno
import functools
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from sqakd_fx.errors import StorageError

_MARKER = ".sqakd-fx"
_FORMAT = 1
_EXPORT = ".export-"
"""What the folders begin with in which a file is exported."""


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file in the same folder, then rename it to `path`.

    Raises:
        StorageError: no space, no permission, or a folder or a device in its place; nothing is left behind, and
            what stood under `path` stands there still.
    """
    temporary = path.with_name(f".{path.stem}.tmp-{os.getpid()}{path.suffix}")
    try:
        if path.exists() and not path.is_file():
            raise StorageError(f"{path} is there and is not a file: choose another --out")
        write(temporary)
        temporary.chmod(0o666 & ~_umask())
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise storage_error(error, path) from error
    except Exception as error:
        if _says_no_space(error):
            raise StorageError(_no_space(path)) from error
        raise
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@functools.cache
def _umask() -> int:
    """What the user's files do not allow; libraries make temporary files that nobody else may read."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _says_no_space(error: Exception) -> bool:
    text = str(error).lower()
    return (
        "no space left" in text
        or "storagefull" in text
        or "os error 28" in text
        or "file too large" in text
    )


def _no_space(path: Path) -> str:
    return f"there is no space left to write {path}: free some or choose another --out"


def storage_error(error: OSError, path: Path) -> StorageError:
    """The sentence for a failed write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or _says_no_space(error):
        return StorageError(_no_space(path))
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StorageError(f"there is no permission to write {path}: choose another --out")
    return StorageError(
        f"{path} cannot be written ({error.strerror or error}): choose another --out"
    )


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomically(path, lambda temporary: _fill(temporary, text))


def _fill(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; numbers that are not finite become null."""
    write_text(path, json.dumps(finite(value), indent=2, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """A value of JSON in which null stands for numbers that are not finite."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value


def read_json(path: Path) -> Any:
    """Read JSON; raises StorageError where it is missing or damaged, a folder, or a device without an end."""
    if path.exists() and not path.is_file():
        raise StorageError(f"{path} is not a file: make it again")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StorageError(
            f"{path} is missing: give a folder that `sqakd-fx quantize` made"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise StorageError(
            f"{path} is damaged or cannot be read ({error}): make it again"
        ) from None


def claim_output_folder(path: Path) -> None:
    """Create a result folder and mark it as ours.

    Raises:
        StorageError: a file or somebody else's folder is in its place, or it cannot be made.
    """
    if path.exists() and not path.is_dir():
        raise StorageError(f"{path} is a file, not a folder: choose another --out")
    marker = path / _MARKER
    try:
        path.mkdir(parents=True, exist_ok=True)
        if marker.exists():
            return
        if not all(map(_is_temporary, path.iterdir())):
            raise StorageError(
                f"the folder {path} exists and was not made by sqakd-fx: choose another --out"
            )
        write_json(marker, {"format": _FORMAT})
    except OSError as error:
        raise storage_error(error, path) from error


def is_result_folder(path: Path) -> bool:
    """True for a folder that `claim_output_folder` marked, or that holds what a run writes."""
    return (path / _MARKER).is_file() or (path / "program.json").is_file()


def remove_temporaries(path: Path) -> None:
    """Delete temporary files that dead processes left in a result folder, which this process holds."""
    for leftover in list(path.rglob(".*")):
        with suppress(OSError):
            if leftover.name.startswith(_EXPORT):
                if not _is_alive(_exporter(leftover)):
                    shutil.rmtree(leftover)
            elif _is_temporary(leftover) and not _is_alive(_maker(leftover)):
                leftover.unlink()


def _is_temporary(path: Path) -> bool:
    """Whether a file has a name that this module, or safetensors while it writes, gives to what is not whole."""
    return _maker(path) is not None or re.fullmatch(r"\.tmp\w{6}", path.name) is not None


def _maker(path: Path) -> int | None:
    """The process that wrote a temporary file of this module."""
    digits = path.name.rpartition(".tmp-")[2].partition(".")[0]
    named = path.name.startswith(".") and ".tmp-" in path.name and digits.isdecimal()
    return int(digits) if named else None


def _exporter(folder: Path) -> int | None:
    """The process that exports in a folder .export-PROCESS-..."""
    digits = folder.name.removeprefix(_EXPORT).partition("-")[0]
    return int(digits) if digits.isdecimal() else None


def _is_alive(process: int | None) -> bool:
    if process is None:
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def delete_files(folder: Path, pattern: str) -> None:
    """Delete what a glob finds in a folder, and the folder where nothing else is left in it."""
    for path in folder.glob(pattern):
        with suppress(OSError):
            path.unlink()
    with suppress(OSError):
        folder.rmdir()
