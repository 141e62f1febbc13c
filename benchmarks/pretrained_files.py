"""What the rows of a network share: its inputs and exact outputs as arrays, and one ONNX file for each row."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from pretrained_environments import NETWORKS

Arrays = list[NDArray[Any]]
CALIBRATION = 128
"""Samples that every tool but ours calibrates with; ours takes what its recipe says."""


def network(name: str) -> ModuleType:
    """The network's file, imported with what lies beside it."""
    sys.path.insert(0, str(NETWORKS))
    return importlib.import_module(name)


def flat(inputs: Any) -> Arrays:
    """The arrays of one batch, in the order of the exported file's inputs."""
    if isinstance(inputs, Mapping):
        return [np.asarray(value) for value in inputs.values()]
    if isinstance(inputs, tuple | list):
        return [np.asarray(value) for value in inputs]
    return [np.asarray(inputs)]


def save(path: Path, arrays: Sequence[NDArray[Any]]) -> None:
    np.savez(path, *arrays)


def load(path: Path) -> Arrays:
    with np.load(path) as saved:
        return [saved[f"arr_{number}"] for number in range(len(saved.files))]


def joined(batches: Sequence[Arrays]) -> Arrays:
    """Batches put end to end, each input or output by itself."""
    return [np.concatenate(column) for column in zip(*batches, strict=True)]


def session(path: Path) -> ort.InferenceSession:
    """As a user starts one, but for the threads: every option has its default."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, ["CPUExecutionProvider"])


def feeds(running: ort.InferenceSession, inputs: Arrays) -> dict[str, NDArray[Any]]:
    return {given.name: value for given, value in zip(running.get_inputs(), inputs, strict=True)}


def batches_of(inputs: Arrays, size: int) -> Iterator[Arrays]:
    for start in range(0, len(inputs[0]), size):
        yield [value[start : start + size] for value in inputs]


def outputs_of(path: Path, inputs: Arrays, size: int = 16) -> Arrays:
    """All outputs of a file over all samples."""
    running = session(path)
    return joined([running.run(None, feeds(running, batch)) for batch in batches_of(inputs, size)])


@dataclass(frozen=True)
class Distance:
    """How far one output is from the float network's."""

    cosine: float
    error: float


def distance(found: NDArray[Any], exact: NDArray[Any]) -> Distance:
    """The mean cosine of a sample's output with the exact one, and the relative error of all of them."""
    one = found.reshape(len(found), -1).astype(np.float64)
    other = exact.reshape(len(exact), -1).astype(np.float64)
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    cosines = np.where(
        lengths > 0, (one * other).sum(1) / np.maximum(lengths, 1e-30), one.any() == other.any()
    )
    return Distance(
        float(cosines.mean()), float(np.linalg.norm(one - other) / np.linalg.norm(other))
    )
