"""Where the stored tensors of an ONNX file lie: in it, or in files of its own folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx

from sqakd_fx.errors import ParityError, short


def require_own_data(model: Path) -> None:
    """Raise ParityError where a tensor of the file lies outside its folder, or the file is no ONNX model."""
    try:
        proto = onnx.load(str(model), load_external_data=False)
    except Exception as error:
        raise ParityError(
            f"{model} is not an ONNX model ({short(error)}): check the file"
        ) from error
    folder = model.parent.resolve()
    for tensor in _external(proto):
        location = next((e.value for e in tensor.external_data if e.key == "location"), "")
        if not _is_inside(folder, location):
            raise ParityError(
                f"{model} stores the tensor {tensor.name!r} in {location!r}, outside its own folder: take the file "
                "from where it was made, with its data beside it"
            )


def _is_inside(folder: Path, location: str) -> bool:
    try:
        return (folder / location).resolve().is_relative_to(folder)
    except (OSError, ValueError):
        return False


def _external(message: Any) -> Iterator[onnx.TensorProto]:
    """Every tensor in a message whose values lie in another file."""
    if isinstance(message, onnx.TensorProto):
        if message.data_location == onnx.TensorProto.EXTERNAL:
            yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for one in [value] if hasattr(value, "ListFields") else value:
                yield from _external(one)
