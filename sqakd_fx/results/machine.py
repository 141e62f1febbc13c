"""The machine that a result was made on, in words."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def processor() -> str:
    """The processor's name and its number of cores."""
    return f"{processor_name()}, {os.cpu_count() or 1} cores"


def processor_name() -> str:
    """What the kernel calls the processor."""
    lines = processor_facts().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if "model name" in line)
    return next(filter(None, names), platform.processor() or platform.machine() or "a processor")


def processor_facts() -> str:
    """All that Linux says of the processors, with their instruction sets; nothing elsewhere."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
