"""Data that should not be given, of many kinds and in many places, for the campaign `data` of faults.py."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

import sqakd_fx
from sqakd_fx.pipeline import Silent

ROWS = torch.randn(160, 6, generator=torch.Generator().manual_seed(0))
BATCHES = ROWS.split(16)
LABELS = torch.arange(16) % 3


class Raises(Exception):
    """Of the user's own code."""


def with_value(value: float) -> Callable[[Tensor], Tensor]:
    def changed(x: Tensor) -> Tensor:
        x = x.clone()
        x[3, 2] = value
        return x

    return changed


SPOILT: dict[str, Callable[[Tensor], Any]] = {
    "NaN": with_value(float("nan")),
    "infinity": with_value(float("inf")),
    "-infinity": with_value(float("-inf")),
    "3e38": with_value(3e38),
    "1e30 everywhere": lambda x: x * 1e30,
    "zeros": lambda x: x * 0,
    "denormals": lambda x: x * 1e-42,
    "complex": lambda x: x.to(torch.complex64),
    "bool": lambda x: x > 0,
    "int64": lambda x: x.long(),
    "uint8": lambda x: x.abs().to(torch.uint8),
    "float16": Tensor.half,
    "float64 beyond float32": lambda x: x.double() * 1e200,
    "requires_grad": lambda x: x.clone().requires_grad_(),
    "of a computation": lambda x: x.clone().requires_grad_() * 2,
    "no rows": lambda x: x[:0],
    "one row": lambda x: x[:1],
    "one axis more": lambda x: x[:, None],
    "two axes less": lambda x: x[0, 0],
    "wider": lambda x: torch.cat([x, x], 1),
    "narrower": lambda x: x[:, :3],
    "no columns": lambda x: x[:, :0],
    "not contiguous": lambda x: x.t().contiguous().t(),
    "expanded": lambda x: x[:1].expand(16, 6),
    "sparse": Tensor.to_sparse,
    "meta": lambda x: x.to("meta"),
    "nested": lambda x: torch.nested.nested_tensor([x[0], x[1]]),
    "array": Tensor.numpy,
    "reversed array": lambda x: x.numpy()[::-1],
    "array of objects": lambda x: np.array([[None] * 6] * 16),
    "array of texts": lambda x: np.array([["a"] * 6] * 16),
    "lists": Tensor.tolist,
    "list of arrays": lambda x: [row.numpy() for row in x],
    "ragged": lambda x: [[1.0], [1.0, 2.0]],
    "a text": lambda x: "photo.jpg",
    "bytes": lambda x: b"\xff\xd8",
    "a path": lambda x: Path("photo.jpg"),
    "None": lambda x: None,
    "a number": lambda x: 3,
    "an exception": lambda x: Raises("a"),
    "a function": lambda x: len,
    "an empty tuple": lambda x: (),
    "a set": lambda x: {1, 2},
    "a dict": lambda x: {"pixels": x},
    "an empty dict": lambda x: {},
    "keys that are no texts": lambda x: {1: x},
    "a model": lambda x: nn.Linear(1, 1),
}  # fmt: skip
"""What may be in the place of a batch."""


class Length(Dataset[Tensor]):
    """Samples of a dataset whose length is whatever it says."""

    def __init__(self, length: Any) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length  # type: ignore[no-any-return]

    def __getitem__(self, index: int) -> Tensor:
        return ROWS[index]


class Fails(Dataset[Tensor]):
    """Samples of which the later ones raise."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, index: int) -> Tensor:
        if index >= 40:
            raise self.error
        return ROWS[index]


class Streamed(IterableDataset[Tensor]):
    """Batches that come until something is raised."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __iter__(self) -> Iterator[Tensor]:
        yield from BATCHES[:5]
        raise self.error


ERRORS = (
    Raises("several\nlines"), ValueError(""), KeyError("x"), IndexError("x"), OSError("gone"), MemoryError("out"),
    RecursionError("deep"), StopIteration(), AssertionError(), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
    Raises("\x1b[31m[/]"), NotImplementedError(),
)  # fmt: skip
WHOLE: dict[str, Any] = {
    "None": None, "a number": 7, "a text": "data", "a path": Path("data"), "a dict": {"x": ROWS}, "a type": list,
    "a model": nn.Linear(6, 3), "an empty list": [], "an empty iterator": iter(()), "an empty tensor": ROWS[:0],
    "a scalar": torch.tensor(1.0), "an exhausted iterator": iter(BATCHES[:0]), "a list of lists": [[[]]],
    "length 0": Length(0), "length below 0": Length(-1), "too long": Length(400), 
    "a length that is no number": Length("a"),
}  # fmt: skip
"""What may be in the place of all data."""


@dataclass(frozen=True)
class Case:
    """A run on data; `keys` are its recipe's."""

    what: str
    data: Any = BATCHES
    eval_data: Any = None
    keys: tuple[tuple[str, Any], ...] = ()
    example: Any = ROWS[:2]


def cases() -> Iterator[Case]:
    for name, spoil in SPOILT.items():
        for place in (0, 5):
            batches = [spoil(x) if i == place else x for i, x in enumerate(BATCHES)]
            yield Case(f"training batch {place}: {name}", batches)
        labelled = [(BATCHES[0], LABELS), (spoil(BATCHES[1]), LABELS)]
        yield Case(f"evaluation batch 1: {name}", eval_data=labelled)
        spoilt_labels = [(x, spoil(x)) for x in BATCHES]
        yield Case(f"evaluation labels: {name}", eval_data=spoilt_labels)
        yield Case(f"training labels: {name}", spoilt_labels, keys=(("labels", 0.5),))
        yield Case(f"example: {name}", example=spoil(BATCHES[0]))
    for name, whole in WHOLE.items():
        yield Case(f"training data: {name}", whole)
        if whole is not None:
            yield Case(f"evaluation data: {name}", eval_data=whole)
    for error in ERRORS:
        yield Case(f"a sample raises {error!r}", Fails(error))
        yield Case(f"a stream raises {error!r}", Streamed(error))


def run(case: Case) -> None:
    """A run of a few steps on a case's data."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    fixed = {"steps": 8, "batch_size": 16, "calibration_batches": 1, "compile": "never"}
    with tempfile.TemporaryDirectory() as folder:
        sqakd_fx.quantize(
            net,
            case.data,
            example_inputs=case.example,
            recipe=fixed | dict(case.keys),
            out=Path(folder) / "out",
            eval_data=case.eval_data,
            observer=Silent(),
        )
