"""Lines of the user's code, "file.py:12", in what Python and torch.fx recorded."""

from __future__ import annotations

import linecache
import re
import sysconfig
import traceback
from pathlib import Path

import torch
from torch import fx

_TORCH = str(Path(torch.__file__).parent)
_OWN = Path(__file__).parents[1]
_STDLIB = Path(sysconfig.get_path("stdlib"))


def line_outside_torch(frames: traceback.StackSummary) -> str | None:
    """file:line of the deepest frame that is neither torch's nor ours."""
    for frame in reversed(frames):
        if (
            not frame.filename.startswith((_TORCH, str(_OWN), "<"))
            and "importlib" not in frame.filename
        ):
            return f"{frame.filename}:{frame.lineno}"
    return None


def model_line(error: BaseException) -> str | None:
    """file:line of the code of a model, installed or not, that an exception came from."""
    return line_outside_torch(traceback.extract_tb(error.__traceback__))


def user_line(error: BaseException, folder: Path | None = None) -> str | None:
    """ "file:line" of the deepest frame of user code, or None.

    User code lies inside `folder`, or without one outside of this package, of installed packages
    and of the standard library.
    """
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if frame.filename.startswith("<") or path.is_relative_to(_OWN):
            continue
        if folder is not None:
            if not path.is_relative_to(folder):
                continue
            path = path.relative_to(folder)
        elif path.is_relative_to(_STDLIB):
            continue
        if not {"site-packages", "dist-packages"} & set(path.parts):
            return f"{frame.filename}:{frame.lineno}"
    return None


def code_line(node: fx.Node) -> str | None:
    """file:line of the user's code that a node came from."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', str(node.meta.get("stack_trace") or ""))
    return line_outside_torch(
        traceback.StackSummary.from_list([(name, int(line), "", None) for name, line in frames])
    )


def code_at(location: str | None) -> str:
    """The text of a "file:line"; empty where there is none."""
    path, _, number = (location or "").rpartition(":")
    return linecache.getline(path, int(number)) if number.isdigit() else ""
