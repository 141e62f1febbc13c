"""A value that no input decides is known while a model is traced: Python code that asks for it gets it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common_models import ROWS, compiled
from torch import Tensor, nn
from torch.nn import functional as F

from sqakd_fx.errors import TraceError
from sqakd_fx.frontend.trace import trace
from sqakd_fx.program import build_program


class Reads(nn.Module):
    """Two layers, and buffers of which `compute` asks for values."""

    def __init__(self, compute: Callable[[Reads, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.c = nn.Linear(6, 6), nn.Linear(6, 6)
        self.register_buffer("two", torch.tensor(2))
        self.register_buffer("part", torch.tensor(0.5))
        self.register_buffer("yes", torch.tensor(True))
        self.register_buffer("bounds", torch.tensor([1, 4]))
        self.register_buffer("mask", torch.tensor([True, False, True, False, False, True]))
        self.gain = nn.Parameter(torch.tensor(3.0))
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


def times(m: Reads, x: Tensor, count: Any) -> Tensor:
    for _ in range(count):
        x = m.a(x)
    return x


READS: dict[str, Callable[[Reads, Tensor], Tensor]] = {
    "item in a slice": lambda m, x: m.a(x)[:, m.two.item() :],
    "tolist": lambda m, x: m.a(x)[:, slice(*m.bounds.tolist())],
    "numpy": lambda m, x: m.a(x)[:, slice(*m.bounds.detach().cpu().numpy())],
    "numpy as an index": lambda m, x: m.a(x)[:, m.bounds.numpy()],
    "a function of numpy's": lambda m, x: m.a(x) * float(np.sqrt(m.part)),
    "an array of numpy's": lambda m, x: m.a(x)[:, : np.asarray(m.two)],
    "from numpy": lambda m, x: m.a(x) + torch.from_numpy(m.mask.numpy()),
    "int in range": lambda m, x: times(m, x, int(m.two)),
    "item in range": lambda m, x: times(m, x, m.two.item()),
    "range": lambda m, x: times(m, x, m.two),
    "item as a key": lambda m, x: {2: m.a, 3: m.c}[m.two.item()](x),
    "item in a dict": lambda m, x: (m.a if m.two.item() in {2: 0} else m.c)(x),
    "an element as a key": lambda m, x: {1: m.a, 4: m.c}[m.bounds.tolist()[0]](x),
    "text": lambda m, x: getattr(m, {"2": "a"}[f"{m.two}"])(x),
    "tensor as an index": lambda m, x: [m.c, m.c, m.a][m.two](x),
    "branch": lambda m, x: m.a(x) if m.yes else m.c(x),
    "identity": lambda m, x: m.a(x) if m.yes.item() is True else m.c(x),
    "comparison": lambda m, x: m.a(x) if m.two == 2 else m.c(x),
    "type": lambda m, x: m.a(x) if isinstance(m.two.item(), int) else m.c(x),
    "float": lambda m, x: m.a(x) * float(m.part),
    "math": lambda m, x: m.a(x) / math.sqrt(m.two),
    "a value computed of them": lambda m, x: m.a(x)[:, : m.bounds.max().item()],
    "a repeated list": lambda m, x: m.a(x)[tuple([slice(None)] * x.dim())],
    "a tensor made of one": lambda m, x: m.a(x) * torch.tensor(m.two),
    "top k": lambda m, x: m.a(x).topk(m.two)[0],
    "sizes": lambda m, x: m.a(x).view(-1, m.two, 3).flatten(1),
    "the parts of a split": lambda m, x: m.a(x).split(m.two, 1)[1],
    "padding": lambda m, x: F.pad(m.a(x), [m.two, 0]),
    "start": lambda m, x: m.a(x).narrow(1, m.two, 3),
    "an axis": lambda m, x: m.a(x).softmax(dim=m.bounds[0]),
}


@pytest.mark.parametrize("compute", READS.values(), ids=READS.keys())
def test_a_constant_that_is_read_has_its_value(compute: Callable[[Reads, Tensor], Tensor]) -> None:
    model = Reads(compute).eval()
    traced = trace(model, ROWS)
    assert traced.front_end == "symbolic"
    assert (traced.float_modules, traced.decisions, traced.frozen) == ((), (), ())
    with torch.no_grad():
        for x in (ROWS, torch.randn(5, 6)):
            torch.testing.assert_close(traced.graph_module(x), model(x))


class Holds(nn.Module):
    def __init__(self, *values: int) -> None:
        super().__init__()
        self.register_buffer("value", torch.tensor(values))

    def forward(self) -> Tensor:
        return self.value


class SliceByTensors(nn.Module):
    """Bounds and axes arrive as tensors, as in models that were made of ONNX files."""

    def forward(self, x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor) -> Tensor:
        slices = {}
        for start, end, axis in zip(starts, ends, axes.detach().cpu().numpy(), strict=True):
            slices[axis] = slice(start, end)
        return x[tuple(slices.get(i, slice(None)) for i in range(max(slices) + 1))]


class ReshapeByTensor(nn.Module):
    def forward(self, x: Tensor, shape: Tensor) -> Tensor:
        if torch.any(shape == 0):
            shape = [x.shape[i] if n == 0 else n for i, n in enumerate(shape)]
        return torch.reshape(x, tuple(shape))


class OfOnnx(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 6), nn.Linear(2, 4)
        self.starts, self.ends, self.axes = Holds(1), Holds(5), Holds(1)
        self.shape = Holds(0, 2, 2)
        self.slice, self.reshape = SliceByTensors(), ReshapeByTensor()

    def forward(self, x: Tensor) -> Tensor:
        y = self.slice(self.a(x), self.starts(), self.ends(), self.axes())
        return self.b(self.reshape(y, self.shape()))


def test_bounds_that_another_module_gives_are_exported(tmp_path: Path) -> None:
    program, checked = compiled(OfOnnx(), (ROWS,), {}, "w8a8", tmp_path)
    assert program.traced.front_end == "symbolic"
    assert program.traced.float_modules == ()
    assert not checked.failures


def test_what_was_read_is_exported(tmp_path: Path) -> None:
    _, checked = compiled(Reads(READS["top k"]), (ROWS,), {}, "w8a8", tmp_path)
    assert not checked.failures


SIZES: dict[str, Callable[[Reads, Tensor], Tensor]] = {
    "tolist": lambda m, x: m.a(x).view(torch.tensor(x.shape).tolist()),
    "item": lambda m, x: m.a(x).view(torch.tensor(x.shape)[0].item(), -1),
    "a key": lambda m, x: {6: m.a, 3: m.c}[x.shape[1]](x),
    "product": lambda m, x: m.a(x).view(len(x), int(torch.prod(torch.tensor(x.shape[1:])))),
}


@pytest.mark.parametrize("compute", SIZES.values(), ids=SIZES.keys())
def test_a_size_that_is_read_follows_the_batch(
    compute: Callable[[Reads, Tensor], Tensor],
) -> None:
    model = Reads(compute).eval()
    traced = trace(model, ROWS)
    assert (traced.front_end, traced.fixed_batch) == ("symbolic", False)
    with torch.no_grad():
        torch.testing.assert_close(traced.graph_module(ROWS[:2]), model(ROWS[:2]))


@pytest.mark.parametrize(
    "compute",
    [
        lambda m, x: m.a(x) * m.gain.item(),
        lambda m, x: m.a(x) * math.exp(m.gain),
        lambda m, x: m.a(x) if m.gain > 0 else m.c(x),
        lambda m, x: F.leaky_relu(m.a(x), m.gain * 0.1),
        lambda m, x: m.a(x) + (2 * m.gain).tolist(),
    ],
    ids=["item", "math", "branch", "argument", "tolist"],
)
def test_a_trained_parameter_that_is_read_is_noted(
    compute: Callable[[Reads, Tensor], Tensor],
) -> None:
    program = build_program(Reads(compute), ROWS, "w8a8")
    (frozen,) = program.traced.frozen
    assert frozen.parameter == "gain"
    assert any(n.node.startswith(f"{__file__}:") and "'gain'" in n.reason for n in program.notes)


def test_a_parameter_that_is_not_trained_and_one_whose_size_is_read_are_not_noted() -> None:
    model = Reads(lambda m, x: m.a(x) * m.gain.item() + m.a.weight.shape[0])
    model.gain.requires_grad_(False)
    assert trace(model, ROWS).frozen == ()


@pytest.mark.parametrize(
    "compute",
    [
        lambda m, x: m.a(x) * float(x.max()),
        lambda m, x: m.a(x) * math.exp(x[0, 0]),
    ],
    ids=["float", "math"],
)
def test_a_value_that_an_input_decides_is_refused_with_its_line(
    compute: Callable[[Reads, Tensor], Tensor],
) -> None:
    with pytest.raises(TraceError, match=rf"{__file__}:\d+.*depends on the data.*specialize"):
        trace(Reads(compute), ROWS, front_end="symbolic")


class Choice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y) if isinstance(y, Tensor) else self.a(y)


class Draws(Choice):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) + torch.rand_like(x)
        return self.b(y)


class Counts(Choice):
    seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return self.b(self.a(x)) * self.seen


@pytest.mark.parametrize(
    ("make", "where"),
    [
        (Choice, "first in 'inner.b', which the model runs and the graph leaves out"),
        (Draws, rf"first in what goes into 'inner.b' \({__file__}:\d+\)"),
        (Counts, rf"first in the output of 'inner' \({__file__}:\d+\)"),
    ],
)
def test_a_graph_that_is_not_the_model_says_where_it_departs(
    make: type[nn.Module], where: str
) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = make(), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.inner(x))

    with pytest.raises(TraceError, match=f"differs from the model by .*, {where}: "):
        trace(Outer(), ROWS, front_end="symbolic")


class Remembers(nn.Module):
    """A branch on a buffer's copy, which an input has changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.register_buffer("largest", torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        largest = self.largest.clone()
        largest.copy_(x.max())
        return self.a(x) if largest < 0.5 else -self.a(x)


def test_a_graph_is_held_against_the_model_on_values_that_the_example_has_not() -> None:
    with pytest.raises(TraceError, match="differs from the model by"):
        trace(Remembers(), torch.zeros(2, 6), front_end="symbolic")
