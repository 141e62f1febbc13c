"""OpenVINO on the CPU, asked as a session of ONNX Runtime is."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from sqakd_fx.errors import ParityError

PRECISE = {"INFERENCE_PRECISION_HINT": "f32"}
"""Float32 where the file says float32; on some processors the default is bfloat16."""
_WITHOUT_PASSES = {"LP_TRANSFORMS_MODE": "NO"}


class OpenVinoModel:
    """A file, or the bytes of a model, compiled for the CPU when it first runs: then its inputs' ranks are known.

    Without `low_precision` its low-precision passes are off, and it computes in float what the file says.

    Raises:
        ParityError: OpenVINO is not installed; when it runs, OpenVINO refuses the model.
    """

    def __init__(self, model: Path | bytes, *, low_precision: bool) -> None:
        self.openvino = _openvino()
        self.model = model
        self.settings = PRECISE if low_precision else PRECISE | _WITHOUT_PASSES
        self.compiled: Any = None

    def __call__(
        self, outputs: Sequence[str] | None, feeds: Mapping[str, Any]
    ) -> list[np.ndarray[Any, Any]]:
        """What it computes of `feeds`, all outputs where `outputs` is None."""
        try:
            if self.compiled is None:
                self.compiled = self._compile(feeds)
            made = self.compiled(dict(feeds))
        except Exception as error:
            raise ParityError(f"OpenVINO refuses the model: {_telling(str(error))}") from error
        found = {name: made[one] for one in self.compiled.outputs for name in one.get_names()}
        wanted = outputs or [one.get_any_name() for one in self.compiled.outputs]
        return [np.array(found[name]) for name in wanted]

    def _compile(self, feeds: Mapping[str, Any]) -> Any:
        core = self.openvino.Core()
        told = self.model if isinstance(self.model, Path) else _with_ranks(self.model, feeds)
        read = core.read_model(str(told) if isinstance(told, Path) else told)
        return core.compile_model(read, "CPU", self.settings)


def _openvino() -> Any:
    try:
        return importlib.import_module("openvino")
    except ImportError as error:
        raise ParityError("OpenVINO is not installed: pip install 'sqakd-fx[openvino]'") from error


def _with_ranks(model: bytes, feeds: Mapping[str, Any]) -> bytes:
    """The model with a rank for each input that has none: OpenVINO converts no operator without one."""
    proto = onnx.load_model_from_string(model)
    for value in proto.graph.input:
        kind = value.type.tensor_type
        if not kind.HasField("shape") and value.name in feeds:
            for _ in feeds[value.name].shape:
                kind.shape.dim.add()
    return bytes(proto.SerializeToString())


def _telling(text: str) -> str:
    """The line of a message that says what is wrong; the first ones say where in OpenVINO's code."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(("Exception from", "Check '"))]
    return (told or lines or ["no reason is given"])[0][:300]
