"""A finished run, to look at and to call."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor, fx

from sqakd_fx.errors import SourceError
from sqakd_fx.results.figures import figures, verdict
from sqakd_fx.runtime.session import execute, session
from sqakd_fx.validation.verdict import Validation


@dataclass(frozen=True, repr=False)
class Result:
    """A finished run: the trained student, the integer program, the files and the figures."""

    out: Path
    student: fx.GraphModule
    lowered: fx.GraphModule
    model_path: Path
    validation: Validation
    report: Mapping[str, Any]

    def __repr__(self) -> str:
        lines = [f"{label:<10}{text}" for label, text in figures(self.report, self.model_path)]
        return "\n".join([f"Result of {self.report['name']}: {self.report['recipe']}", *lines])

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(label)}</th><td>{html.escape(text)}</td></tr>"
            for label, text in figures(self.report, self.model_path)
        )
        title = html.escape(f"{self.report['name']}: {self.report['recipe']}")
        _, sentence = verdict(self.report)
        return f"<table><caption>{title}</caption>{rows}</table><p>{html.escape(sentence)}</p>"

    def session(self) -> ort.InferenceSession:
        """A session of ONNX Runtime on the file, with the options that it was validated with."""
        return session(self.model_path, exact_products=self.validation.deployed.exact_products)

    def predict(self, *inputs: Any, **named: Any) -> Tensor | dict[str, Tensor]:
        """What the file computes of tensors or arrays: the output, or all outputs by name where there are several.

        Raises:
            SourceError: there are more or fewer inputs than the file has, or one has an unknown name.
        """
        running = self.session()
        names = [one.name for one in running.get_inputs()]
        feeds = dict(zip(names, inputs)) | named
        if len(inputs) > len(names) or set(feeds) != set(names):
            raise SourceError(f"the file takes {', '.join(names)}: give each of them once")
        arrays = {name: _array(value) for name, value in feeds.items()}
        outputs = [torch.from_numpy(np.asarray(y)) for y in execute(running, None, arrays)]
        if len(outputs) == 1:
            return outputs[0]
        return {one.name: y for one, y in zip(running.get_outputs(), outputs, strict=True)}


def _array(value: Any) -> np.ndarray[Any, Any]:
    """Floats in float32, as files have them."""
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    return array.astype(np.float32) if array.dtype.kind == "f" else array
