"""Errors that a user sees: one sentence that says what is wrong, where, and what to do."""

from __future__ import annotations

import re


class SqakdError(Exception):
    """Base of every error that is the input's fault and not this program's.

    The message is a complete sentence for the terminal. `node` names the graph node and `location`
    the line of the user's code ("file.py:12"), where these are known.
    """

    def __init__(self, message: str, *, node: str | None = None, location: str | None = None):
        super().__init__(message)
        self.node = node
        self.location = location


class SourceError(SqakdError):
    """The model, its weights or its data cannot be loaded."""


class TraceError(SqakdError):
    """The model cannot be turned into a graph."""


class RecipeError(SqakdError):
    """A recipe has an unknown key, a value out of range, or an override that matches nothing."""


class UnknownFamilyError(RecipeError):
    """A recipe names a quantizer family that nobody has registered, so far."""


class PassError(SqakdError):
    """A pass was given a graph that an earlier pass should have prepared, or broke its promise."""


class TrainingError(SqakdError):
    """Distillation cannot go on: no data, no finite loss, or a checkpoint that does not fit."""


class NotFiniteError(TrainingError):
    """A tensor that is to get a grid holds NaN or infinity."""


class ExportError(SqakdError):
    """The student cannot be written in the format that was asked for."""


class ParityError(SqakdError):
    """An exported model does not compute what the student computes."""


class StorageError(SqakdError):
    """A result cannot be written or read: permission, space, or a folder that is not ours."""


def first_line(error: BaseException) -> str:
    """What another library says, short enough to be quoted in a sentence."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")[:200]


def short(error: BaseException) -> str:
    """The type and the telling line of an error, to stand inside a sentence."""
    name = type(error).__name__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    text = lines[0]
    if text.startswith("Caught ") and " in DataLoader worker" in text:
        telling = [line for line in lines if re.match(rf"([\w.]+\.)?{name}: ", line)]
        text = telling[-1].partition(": ")[2] if telling else ""
    elif text.endswith("raised:") and len(lines) > 1:
        text = lines[1]
    text = re.sub(r"\.\s+", "; ", text.rstrip("."))[:300]
    return f"{name}: {text}" if text else name
