"""Small model.py files, and what refuses to load them."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from sqakd_fx.errors import SourceError
from sqakd_fx.source.source import load_source

NET = """
import torch
from torch import nn

def model():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.LazyLinear(3))
"""
LINEAR = """
import torch
from torch import nn

def model():
    return nn.Linear(4, 2)
"""
EXAMPLE = "def example_inputs():\n    return torch.zeros(1, 4)\n"


def write(folder: Path, text: str, name: str = "model.py") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(dedent(text))
    return str(folder / name)


def refused(spec: str, **options: Any) -> SourceError:
    with pytest.raises(SourceError) as raised:
        load_source(spec, **options)
    message = str(raised.value)
    assert "\n" not in message
    assert ". " not in message.removeprefix(". ")
    assert raised.value.location is None or raised.value.location in message
    return raised.value
