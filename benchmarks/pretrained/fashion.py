"""The residual CNN of this repository's example: the one network that needs no other package."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

FAMILY = "small residual CNN"
WEIGHTS = ()
INPUTS = "Fashion-MNIST images of examples/fashion"
SCORE = "top-1 of 500 images (%)"
EXAMPLE = Path(__file__).parents[2] / "examples" / "fashion"


@cache
def example() -> ModuleType:
    """The example's model.py, which imports what lies beside it."""
    sys.path.insert(0, str(EXAMPLE))
    spec = importlib.util.spec_from_file_location("fashion_example", EXAMPLE / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def model() -> nn.Module:
    return example().model()  # type: ignore[no-any-return]


def example_inputs() -> Tensor:
    return example().example_inputs()  # type: ignore[no-any-return]


def train_data() -> Any:
    return example().train_data()


def eval_data() -> list[tuple[Tensor, Tensor]]:
    return list(islice(example().eval_data(), 2))


def metric(outputs: Any, targets: Any) -> float:
    return float((np.asarray(outputs).argmax(1) == np.asarray(targets)).mean() * 100)


def score(outputs: list[NDArray[Any]], exact: list[NDArray[Any]], labels: NDArray[Any]) -> float:
    return metric(outputs[0], labels)
