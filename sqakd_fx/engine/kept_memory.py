"""A step's memory stays with the process until the next step.

glibc gives freed memory back to the system whenever much of it is free, and asks for each large tensor anew, so
that the system fills hundreds of megabytes with zeros in every step. While a network trains on a CPU, what a
step has freed is kept for the next one.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import platform
from collections.abc import Iterator

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Parameters of `mallopt`, from glibc's malloc.h."""
_DURING = {_TRIM_THRESHOLD: 2**31 - 1, _MMAP_MAX: 0}
_AFTER = {_TRIM_THRESHOLD: 64 * 2**20, _MMAP_MAX: 65536}
"""What glibc starts from, or on 64 bits comes to."""


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """Inside, freed memory stays with the process; on leaving it goes back. Nothing without glibc."""
    libc = _glibc()
    if libc is None:
        yield
        return
    for parameter, value in _DURING.items():
        libc.mallopt(parameter, value)
    try:
        yield
    finally:
        for parameter, value in _AFTER.items():
            libc.mallopt(parameter, value)
        libc.malloc_trim(0)


def give_back_memory() -> None:
    """Return what is freed to the system once, as behind compiling. Nothing without glibc."""
    libc = _glibc()
    if libc is not None:
        gc.collect()
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
