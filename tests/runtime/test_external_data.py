"""An ONNX file reads no file but those of its own folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from sqakd_fx.errors import ParityError
from sqakd_fx.runtime.external_data import require_own_data


def stored_in(location: str) -> onnx.TensorProto:
    tensor = onnx.numpy_helper.from_array(np.zeros(4, np.float32), "w")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return tensor


def saved(folder: Path, tensor: onnx.TensorProto, *, inside: bool) -> Path:
    folder.mkdir(exist_ok=True)
    if inside:
        node = onnx.helper.make_node("Constant", [], ["y"], value=tensor)
        graph = onnx.helper.make_graph([node], "g", [], [])
    else:
        graph = onnx.helper.make_graph([], "g", [], [], [tensor])
    path = folder / "model.onnx"
    path.write_bytes(onnx.helper.make_model(graph).SerializeToString())
    return path


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "a/../../secret", "link"])
def test_a_tensor_outside_the_folder_is_refused(
    tmp_path: Path, location: str, inside: bool
) -> None:
    (tmp_path / "secret").write_bytes(bytes(16))
    path = saved(tmp_path / "net", stored_in(location), inside=inside)
    (path.parent / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(ParityError, match="outside its own folder"):
        require_own_data(path)


def test_a_tensor_beside_the_file_is_taken(tmp_path: Path) -> None:
    require_own_data(saved(tmp_path / "net", stored_in("model.onnx.data"), inside=False))


def test_what_is_no_model_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"\xff\xff nonsense")
    with pytest.raises(ParityError, match="is not an ONNX model"):
        require_own_data(tmp_path / "x.onnx")
