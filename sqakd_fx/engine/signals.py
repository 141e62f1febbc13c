"""SIGINT and SIGTERM as a wish that a run can grant between two steps."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def collected_signals() -> Iterator[list[int]]:
    """The signals that arrived so far; the second one raises KeyboardInterrupt.

    Outside the main thread, where Python takes no handlers, the list stays empty.
    """
    received: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    try:
        previous = {s: signal.signal(s, remember) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
