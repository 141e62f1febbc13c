"""Ctrl-C and SIGTERM end a command with a sentence, whatever it is doing."""

from __future__ import annotations

import os
import signal
from types import FrameType

STOPPED = "sqakd-fx: stopped; nothing half-written was left"
_STATUS = 130
_IMPORT = "<frozen importlib._bootstrap>"


def stop_on_signals() -> None:
    """Let SIGINT and SIGTERM raise KeyboardInterrupt in this process.

    While a module is imported they end the process at once: C++ code of a library would not take the exception, and
    nothing is written there. A process that this one has forked, to load data, ends as it would by default.
    """
    this = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != this:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif _imports(frame):
            os.write(2, f"{STOPPED}\n".encode())
            os._exit(_STATUS)
        else:
            raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as a shell starts a background job
            signal.signal(number, stop)


def _imports(frame: FrameType | None) -> bool:
    """Whether an import is among the calls that led to a frame."""
    while frame is not None:
        if frame.f_code.co_filename == _IMPORT:
            return True
        frame = frame.f_back
    return False
