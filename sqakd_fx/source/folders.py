"""Files of a folder by their kind."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path


def files_of(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """The files at any depth whose names end in one of `suffixes`, in small letters or capitals, in order."""
    named = (path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
    return sorted(path for path in named if path.is_file())
