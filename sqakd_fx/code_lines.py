"""Lines of the user's code, "file.py:12", in what Python and torch.fx recorded."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

import torch
from torch import fx

_TORCH = str(Path(torch.__file__).parent)


def line_outside_torch(frames: traceback.StackSummary) -> str | None:
    """file:line of the deepest frame that is neither torch's nor ours."""
    own = str(Path(__file__).parent)
    for frame in reversed(frames):
        if not frame.filename.startswith((_TORCH, own, "<")) and "importlib" not in frame.filename:
            return f"{frame.filename}:{frame.lineno}"
    return None


def user_line(error: BaseException) -> str | None:
    """file:line of the user's code that an exception came from."""
    return line_outside_torch(traceback.extract_tb(error.__traceback__))


def code_line(node: fx.Node) -> str | None:
    """file:line of the user's code that a node came from."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', str(node.meta.get("stack_trace") or ""))
    return line_outside_torch(
        traceback.StackSummary.from_list([(name, int(line), "", None) for name, line in frames])
    )
