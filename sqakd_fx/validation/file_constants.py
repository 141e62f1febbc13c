"""The stored tensors of an ONNX file, and what is made of them when it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

Array = np.ndarray[Any, Any]


class FileConstants:
    """Reads the stored tensors of `proto` one at a time; external data lies in `folder`."""

    def __init__(self, proto: onnx.ModelProto, folder: Path) -> None:
        self.folder = str(folder)
        self.stored = {i.name: i for i in proto.graph.initializer}
        self.made = {
            n.output[0]: n
            for n in proto.graph.node
            if n.op_type in ("Cast", "Mul", "Add", "Reshape")
        }

    def origin(self, name: str) -> str:
        """The stored tensor behind what is made of it."""
        while name in self.made:
            name = self.made[name].input[0]
        return name

    def value(self, name: str) -> Array | None:
        """A tensor that does not depend on the inputs; integers are int32. None for others."""
        if name in self.stored:
            array: Array = numpy_helper.to_array(self.stored[name], self.folder)
            return array if array.dtype == np.float32 else array.astype(np.int32)
        node = self.made.get(name)
        first = None if node is None else self.value(node.input[0])
        if node is None or first is None or node.op_type in ("Cast", "Reshape"):
            return first
        second = self.value(node.input[1])
        if second is None:
            return None
        return np.multiply(first, second) if node.op_type == "Mul" else np.add(first, second)

    def element_type(self, name: str) -> int | None:
        """The TensorProto type of a stored tensor, or of what a Cast makes of it. None for others."""
        if name in self.stored:
            return int(self.stored[name].data_type)
        node = self.made.get(name)
        if node is None:
            return None
        if node.op_type == "Cast":
            return next(int(a.i) for a in node.attribute if a.name == "to")
        return self.element_type(node.input[0])
