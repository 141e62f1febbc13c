"""What a file does to images of bytes: proved for every byte of every channel, and taken off for the comparisons.

The trained graph takes floats. So the file behind its preprocessing is held against it, and the preprocessing against
the same operations in PyTorch.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import torch
from torch import Tensor

from sqakd_fx.exporters.preprocessing import PREFIX
from sqakd_fx.recipe.keys import Preprocess
from sqakd_fx.runtime.preprocessing import TO_NHWC, floats_of, of_metadata
from sqakd_fx.runtime.session import execute, session

_BYTES = 256


@contextmanager
def behind_preprocessing(model: Path) -> Iterator[Path]:
    """The file as it is behind its preprocessing, which goes again."""
    with tempfile.TemporaryDirectory() as folder:
        yield _without_preprocessing(model, Path(folder))


def _without_preprocessing(model: Path, folder: Path) -> Path:
    proto = onnx.load(str(model), load_external_data=False)
    own = preprocessing_nodes(proto.graph.node)
    inside = {name for node in own for name in node.output}
    rest = [node for node in proto.graph.node if node not in own]
    given = _names_of_floats(proto, own)
    types = {value.name: value for value in proto.graph.value_info}
    for value in proto.graph.input:
        if value.name in given:
            floats = types[given[value.name]]
            value.type.CopyFrom(floats.type)
            for node in rest:
                node.input[:] = [value.name if n == floats.name else n for n in node.input]
    kept = [value for value in proto.graph.value_info if value.name not in inside]
    del proto.graph.node[:], proto.graph.value_info[:]
    proto.graph.node.extend(rest)
    proto.graph.value_info.extend(kept)
    path = folder / model.name
    beside = model.with_name(f"{model.name}.data")
    if beside.exists():
        shutil.copyfile(beside, folder / beside.name)
    path.write_bytes(proto.SerializeToString())
    return path


def preprocessing_nodes(nodes: Iterable[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Those in front of the model that make floats of images of bytes."""
    return [node for node in nodes if node.name.startswith(PREFIX)]


def _names_of_floats(proto: onnx.ModelProto, own: list[onnx.NodeProto]) -> dict[str, str]:
    """For each input of bytes, the tensor that the preprocessing gives."""
    following = {node.input[0]: node.output[0] for node in own}
    found = {}
    for value in proto.graph.input:
        name = value.name
        while name in following:
            name = following[name]
        if name != value.name:
            found[value.name] = name
    return found


def wrong_preprocessing(model: Path, inputs: tuple[Tensor, ...]) -> list[str]:
    """A sentence for each input of bytes of which the file makes other numbers than PyTorch; `inputs` are of a call."""
    proto = onnx.load(str(model), load_external_data=False)
    own = preprocessing_nodes(proto.graph.node)
    taken = of_metadata({one.key: one.value for one in proto.metadata_props})
    outer = {value.name for value in proto.graph.input}
    found = []
    for value, x in zip(proto.graph.input, inputs, strict=True):
        nodes = [node for node in own if node.name.startswith(f"{PREFIX}{value.name}/")]
        if not nodes or value.name not in taken:
            continue
        read = {name for node in nodes for name in node.input} - outer
        stored = [tensor for tensor in proto.graph.initializer if tensor.name in read]
        floats = onnx.helper.make_tensor_value_info(
            nodes[-1].output[0], onnx.TensorProto.FLOAT, None
        )
        graph = onnx.helper.make_graph(nodes, "preprocessing", [value], [floats], stored)
        alone = onnx.helper.make_model(
            graph, opset_imports=proto.opset_import, ir_version=proto.ir_version
        )
        how = taken[value.name]
        if not _gives_the_same(alone.SerializeToString(), value.name, x, how):
            found.append(
                f"{value.name}: the preprocessing in the file gives other numbers than (x / {how.scale:g} - mean) / "
                "std in float32"
            )
    return found


def _gives_the_same(alone: bytes, name: str, x: Tensor, how: Preprocess) -> bool:
    """On every byte in every channel of images of the size of `x`."""
    image = x[:1].permute(TO_NHWC) if how.layout == "nhwc" else x[:1]
    channels = image.shape[-1] if how.layout == "nhwc" else 1
    running = session(alone)
    for start in range(0, _BYTES, max(image.numel() // x.shape[1], 1)):
        places = torch.arange(image.numel()).reshape(image.shape)
        pixels = places // channels if how.layout == "nhwc" else places % (x.shape[2] * x.shape[3])
        images = ((pixels + start) % _BYTES).to(torch.uint8)
        (got,) = execute(running, None, {name: images.numpy()})
        if not torch.equal(torch.from_numpy(got), floats_of(images, how)):
            return False
    return True
