"""The machine that a result was made on, in words."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def processor() -> str:
    """The processor's name and its number of cores."""
    return f"{_name()}, {os.cpu_count() or 1} cores"


def _name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    names = (line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line)
    return next(filter(None, names), platform.processor() or platform.machine() or "a processor")
