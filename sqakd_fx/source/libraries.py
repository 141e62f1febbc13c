"""Libraries that one kind of data needs, and that not everybody installs."""

from __future__ import annotations

import importlib
from typing import Any

from sqakd_fx.errors import SourceError


def library(name: str, what: str, extra: str) -> Any:
    """A module of a library; raises SourceError where it is not installed: `what` needs it, and `extra` brings it."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        package = name.partition(".")[0]
        raise SourceError(f"{what} needs {package}: pip install 'sqakd-fx[{extra}]'") from error
