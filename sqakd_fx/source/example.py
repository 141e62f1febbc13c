"""The example of the README, which the package carries."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

from sqakd_fx.errors import StorageError
from sqakd_fx.storage import write_atomically

FILES = (
    "model.py",
    "network.py",
    "weights.safetensors",
    "train_images.npz",
    "test.npz",
    "LICENSE-DATA",
)
"""What of the folder is written: code, trained weights, 2,000 unlabelled images, 1,000 labelled ones, their licence."""

_PACKAGE = Path(__file__).parents[1]


def example_folder() -> Path:
    """Where the example lies: inside an installed package, or beside it in a checkout."""
    installed = _PACKAGE / "example"
    return installed if installed.exists() else _PACKAGE.parent / "examples" / "fashion"


def write_example(folder: Path) -> Path:
    """Write the example into a folder and return its model.py.

    Raises:
        StorageError: the folder holds another file under one of the names; nothing is written.
    """
    held = example_folder()
    other = [name for name in FILES if _differs(held / name, folder / name)]
    if other:
        raise StorageError(
            f"{folder / other[0]} is there and is not the example's: name an empty folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        write_atomically(folder / name, partial(_copy, held / name))
    return folder / "model.py"


def _differs(held: Path, found: Path) -> bool:
    return found.exists() and (found.is_dir() or found.read_bytes() != held.read_bytes())


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
