"""A torch.export program of the lowered student: the integer reference, to be run in PyTorch."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from sqakd_fx.errors import ExportError
from sqakd_fx.storage import write_atomically


def save_program(
    lowered: fx.GraphModule, example: Sequence[Any], path: Path, shapes: tuple[Any, ...]
) -> None:
    """torch.export.save, with the open axes of each input in `shapes`. Raises ExportError, StorageError."""
    inputs = tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in example)
    takes_varargs = any(
        str(n.target).startswith("*") for n in lowered.graph.find_nodes(op="placeholder")
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(
                lowered, inputs, dynamic_shapes=(shapes,) if takes_varargs else shapes
            )
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ExportError(f"the student cannot be written as pt2: {first}") from error
        write_atomically(path, lambda temporary: _save(program, temporary))


def _save(program: torch.export.ExportedProgram, path: Path) -> None:
    with path.open("wb") as handle:
        torch.export.save(program, handle)
