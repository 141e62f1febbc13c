"""What copy.deepcopy refuses does not stand in the way of a copy."""

from __future__ import annotations

import contextvars
import math
import queue
import threading
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sqakd_fx.ir.copying import deep_copy
from sqakd_fx.program import build_program
from sqakd_fx.recipe.resolution import resolve_recipe


class Settings:
    """A plain object that holds what it is given."""

    def __init__(self, held: Any) -> None:
        self.held = held


class Holding(nn.Module):
    """A linear layer beside something without a copy, in an attribute, a list and an object."""

    def __init__(self, held: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.held, self.listed, self.settings = held, [{"one": (held,)}], Settings(held)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


REFUSED: dict[str, Callable[[], Any]] = {
    "a Python module": lambda: math,
    "a lock": threading.Lock,
    "a reentrant lock": threading.RLock,
    "an event": threading.Event,
    "values of a thread": threading.local,
    "a queue": queue.Queue,
    "a simple queue": queue.SimpleQueue,
    "an open file": lambda: Path(__file__).open(),  # noqa: SIM115
    "a generator": lambda: (n for n in range(3)),
    "a pool of threads": lambda: ThreadPoolExecutor(1),
    "a read-only mapping": lambda: types.MappingProxyType({"a": 1}),
    "a context variable": lambda: contextvars.ContextVar("name"),
    "a view of bytes": lambda: memoryview(b"abc"),
    "facts of a dtype": lambda: torch.finfo(torch.float32),
    "a tensor with a gradient history": lambda: torch.ones(3, requires_grad=True) * 2,
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_holds_it_is_copied_and_quantized(kind: str) -> None:
    model = Holding(REFUSED[kind]()).eval()
    copied = deep_copy(model)
    assert copied.linear is not model.linear
    assert copied.settings is not model.settings
    torch.testing.assert_close(copied.linear.weight, model.linear.weight)
    program = build_program(model, torch.randn(2, 4), resolve_recipe("w8a8"))
    assert program.student is not None


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.math, self.first, self.second = math, nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) * self.math.pi)


def test_what_is_shared_is_used_by_the_copy() -> None:
    model, x = Gated().eval(), torch.randn(2, 4)
    torch.testing.assert_close(deep_copy(model)(x), model(x))


def test_a_tensor_with_a_history_is_copied_without_it() -> None:
    history = torch.ones(3, requires_grad=True) * 2
    copied = deep_copy(Holding(history))
    assert copied.listed[0]["one"][0] is copied.held
    assert copied.held.is_leaf
    copied.held[0] = 7
    assert history[0] == 2
