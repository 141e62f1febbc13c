"""A file that does not compute what was trained is found out, and the place is named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from export_jobs import job_of
from onnx import numpy_helper
from torch import Tensor, nn

from sqakd_fx.exporters.profiles import Export, Exported, write_profile
from sqakd_fx.program import Program
from sqakd_fx.validation.parity import first_divergence
from sqakd_fx.validation.validate import validate
from sqakd_fx.validation.verdict import Validation


def change(path: Path, name: str, how: Callable[[np.ndarray], np.ndarray]) -> None:
    """Rewrite one initializer of a file."""
    model = onnx.load(path)
    (stored,) = [i for i in model.graph.initializer if i.name == name]
    stored.CopyFrom(numpy_helper.from_array(how(numpy_helper.to_array(stored)), name))
    onnx.save(model, path)


@pytest.fixture
def exported(
    residual_net: nn.Module, images: Tensor, tmp_path: Path
) -> tuple[Program, Export, Exported]:
    program, job = job_of(residual_net, images, "w4a4", "lsq", "batch_norm=absorb")
    return program, job, write_profile("container", job, tmp_path / "model.onnx")


def test_validation_in_many_sections_finds_what_one_section_finds(
    residual_net: nn.Module, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, job = job_of(residual_net, images, "w4a4", "lsq", "batch_norm=absorb")
    path = write_profile("container", job, tmp_path / "model.onnx").path
    change(path, "layers.0.conv2.bias", lambda x: x + np.int32(40))
    found = []
    for most in (1 << 27, 4000, 1):
        monkeypatch.setattr("sqakd_fx.validation.validate._CODES_AT_ONCE", most)
        found.append(validate(program.student, job.lowered, path, [(images,), (images[:3],)]))
    assert found[0] == found[1] == found[2]
    (first, *_) = (first_divergence(runtime.tensors) for runtime in found[0].runtimes)
    assert first is not None
    assert (first.name, first.producer) == ("layers.0.bn2_quantized", "Conv")


def test_samples_behind_the_most_codes_are_compared_by_what_is_returned(
    exported: tuple[Program, Export, Exported], images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, job, written = exported
    parts = [(images,), (images.flip(0),), (images[:3],)]
    told: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def checked_with(most: int) -> Validation:
        told[most] = []
        monkeypatch.setattr("sqakd_fx.validation.validate._CODES_IN_ALL", most)
        return validate(
            program.student,
            job.lowered,
            written.path,
            parts,
            on_answers=lambda inputs, student, file: told[most].append((student[0], file[0])),
        )

    whole, part = checked_with(1 << 27), checked_with(1)
    assert (whole.samples, whole.samples_by_code) == (2 * len(images) + 3,) * 2
    assert (part.samples, part.samples_by_code) == (whole.samples, 8)
    for all_of_it, some in zip(whole.deployed.tensors, part.deployed.tensors, strict=True):
        assert some.elements * whole.samples == all_of_it.elements * 8
    for one, other in zip(
        zip(*told[1], strict=True), zip(*told[1 << 27], strict=True), strict=True
    ):
        assert torch.equal(torch.cat(one), torch.cat(other))
    assert part.failures == whole.failures == ()


def test_a_prediction_that_changes_behind_the_most_codes_is_counted(
    exported: tuple[Program, Export, Exported], images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sqakd_fx.validation.validate._CODES_IN_ALL", 1)
    program, job, written = exported
    change(
        written.path,
        "fc.bias",
        lambda x: np.where(np.arange(len(x)) == 3, 1 << 20, x).astype(x.dtype),
    )
    answered = program.student(images).argmax(1)
    (right,) = (answered == 3).nonzero(as_tuple=True)
    assert len(right) < len(images)
    checked = validate(program.student, job.lowered, written.path, [(images[:1],), (images,)])
    expected = (int(answered[0] == 3) + len(right)) / (1 + len(images))
    assert checked.deployed.agreement == pytest.approx(expected)
    assert not checked.deployed.keeps_predictions


WRONG = {
    "activation scale": ("layers.0.relu_1.scale", lambda x: x * np.float32(1.0001), "layers.0.relu_1_quantized"),
    "weight scale": ("layers.1.conv1.weight_scale", lambda x: x * np.float32(1.0001), "layers.1.conv1.weight"),
    "zero point": ("layers.0.bn2.zero_point", lambda x: x + np.uint8(1), "layers.0.bn2_quantized"),
    "bias": ("layers.0.conv2.bias", lambda x: np.roll(x, 1), "layers.0.conv2.bias"),
    "weight": ("fc.weight", lambda x: np.roll(x, 1), "fc.weight"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_number_in_the_file_is_caught_and_named(
    exported: tuple[Program, Export, Exported], images: Tensor, case: str
) -> None:
    program, job, written = exported
    name, how, telling = WRONG[case]
    change(written.path, name, how)
    checked = validate(program.student, job.lowered, written.path, [(images,)])
    assert any(failure.startswith(telling) for failure in checked.failures), checked.failures


def without_clip(model: onnx.ModelProto) -> None:
    clip = next(n for n in model.graph.node if n.op_type == "Clip" and "relu_1" in n.output[0])
    maker = next(n for n in model.graph.node if n.output[0] == clip.input[0])
    maker.output[0] = clip.output[0]
    model.graph.node.remove(clip)


def with_swapped_weights(model: onnx.ModelProto) -> None:
    readers = [
        next(n for n in model.graph.node if name in n.input)
        for name in ("layers.0.conv1.weight", "layers.0.conv2.weight")
    ]
    first, second = (list(reader.input) for reader in readers)
    readers[0].input[:], readers[1].input[:] = second, first


def with_shifted_padding(model: onnx.ModelProto) -> None:
    """Padding (2, 0) for (1, 1): the same shape, other values."""
    conv = next(n for n in model.graph.node if n.name == "layers.0.conv2/Conv")
    (pads,) = (a for a in conv.attribute if a.name == "pads")
    pads.ints[:] = [2, 2, 0, 0]


def with_a_scale_of_its_own(model: onnx.ModelProto) -> None:
    """One of the operators that read the codes behind the pool reads them with another scale."""
    pool = next(n for n in model.graph.node if n.op_type == "MaxPool")
    reader = next(n for n in model.graph.node if n.input[0] == pool.output[0])
    (scale,) = (i for i in model.graph.initializer if i.name == reader.input[1])
    value = numpy_helper.to_array(scale) * np.float32(1.0001)
    model.graph.initializer.append(numpy_helper.from_array(value, "own"))
    reader.input[1] = "own"


def without_a_tensor(model: onnx.ModelProto) -> None:
    """The name of a quantized tensor is lost, with its annotation."""
    name = "layers.0.bn2_quantized"
    for node in model.graph.node:
        node.input[:] = ["nameless" if x == name else x for x in node.input]
        node.output[:] = ["nameless" if x == name else x for x in node.output]
    notes = [n for n in model.graph.quantization_annotation if n.tensor_name != name]
    values = [v for v in model.graph.value_info if v.name != name]
    del model.graph.quantization_annotation[:], model.graph.value_info[:]
    model.graph.quantization_annotation.extend(notes)
    model.graph.value_info.extend(values)


MISWIRED = {
    "missing clip": (without_clip, "layers.0.relu_1_quantized"),
    "swapped weights": (with_swapped_weights, "layers.0.relu_1_quantized"),
    "shifted padding": (with_shifted_padding, "layers.0.bn2_quantized"),
    "a scale behind a pool": (with_a_scale_of_its_own, "relu_quantized"),
    "lost tensor": (without_a_tensor, "layers.0.bn2_quantized"),
}


@pytest.mark.parametrize("case", MISWIRED)
def test_a_wrong_graph_in_the_file_is_caught_and_named(
    exported: tuple[Program, Export, Exported], images: Tensor, case: str
) -> None:
    program, job, written = exported
    how, telling = MISWIRED[case]
    model = onnx.load(written.path)
    how(model)
    onnx.save(model, written.path)
    checked = validate(program.student, job.lowered, written.path, [(images * 9,)])
    assert any(telling in failure for failure in checked.failures), checked.failures


def readers_of(model: onnx.ModelProto, weight: str) -> Iterator[onnx.NodeProto]:
    """The DequantizeLinears of a weight, also behind what unpacks it."""
    makers = {n.output[0]: n for n in model.graph.node}
    for reader in model.graph.node:
        origin = reader.input[0] if reader.op_type == "DequantizeLinear" else ""
        while origin in makers and makers[origin].op_type in ("Cast", "Mul", "Add"):
            origin = makers[origin].input[0]
        if origin == weight:
            yield reader


@pytest.mark.parametrize("profile", ["packed", "typed"])
def test_a_wrong_number_is_caught_and_named_in_small_files_too(
    residual_net: nn.Module, images: Tensor, tmp_path: Path, profile: str
) -> None:
    program, job = job_of(residual_net, images, "w2a2")
    path = write_profile(profile, job, tmp_path / "model.onnx").path
    change(path, "layers.1.conv2.bias", lambda x: np.roll(x, 1))
    for reader in readers_of(onnx.load(path), "layers.1.conv1.weight"):
        change(path, reader.input[1], lambda x: x * np.float32(1.0001))
    failures = validate(program.student, job.lowered, path, [(images,)]).failures
    for name in ("layers.1.conv2.bias", "layers.1.conv1.weight"):
        assert any(failure.startswith(name) for failure in failures), failures


def with_own(model: onnx.ModelProto, node: onnx.NodeProto, index: int, value: np.ndarray) -> None:
    """Give one operator a stored input of its own; others may share the old one."""
    model.graph.initializer.append(numpy_helper.from_array(value, "own"))
    node.input[index] = "own"


def stored(model: onnx.ModelProto, name: str) -> np.ndarray:
    (found,) = (i for i in model.graph.initializer if i.name == name)
    return numpy_helper.to_array(found)


def maker_of(model: onnx.ModelProto, tensor: str) -> onnx.NodeProto:
    """The QuantizeLinear of an activation, in front of its Clip where there is one."""
    makers = {n.output[0]: n for n in model.graph.node}
    maker = makers[tensor]
    return makers[maker.input[0]] if maker.op_type == "Clip" else maker


def with_a_scale_off(model: onnx.ModelProto) -> None:
    maker = maker_of(model, "layers.0.relu_1_quantized")
    with_own(model, maker, 1, stored(model, maker.input[1]) * np.float32(1.0001))


def with_a_swapped_zero_point(model: onnx.ModelProto) -> None:
    """The zero point of another tensor."""
    maker, other = (maker_of(model, f"layers.0.{x}_quantized") for x in ("relu_1", "bn2"))
    assert stored(model, maker.input[2]) != stored(model, other.input[2])
    maker.input[2] = other.input[2]


def with_one_channel_off(model: onnx.ModelProto) -> None:
    """The scale of one channel of a weight, in all that reads it."""
    for reader in readers_of(model, "layers.1.conv1.weight"):
        scale = stored(model, reader.input[1]).copy()
        assert scale.shape == (16,)
        scale[3] *= np.float32(1.0001)
        with_own(model, reader, 1, scale)


WRONG_EXPORTS = {
    "a scale off by 1e-4": (with_a_scale_off, "layers.0.relu_1_quantized"),
    "a swapped zero point": (with_a_swapped_zero_point, "layers.0.relu_1_quantized"),
    "a missing clip": (without_clip, "layers.0.relu_1_quantized"),
    "the scale of one channel off by 1e-4": (with_one_channel_off, "layers.1.conv1.weight"),
}


@pytest.mark.parametrize("case", WRONG_EXPORTS)
@pytest.mark.parametrize("profile", ["container", "packed", "typed"])
def test_a_deliberately_wrong_export_is_caught_and_named(
    residual_net: nn.Module, images: Tensor, tmp_path: Path, profile: str, case: str
) -> None:
    program, job = job_of(residual_net, images, "w4a4", "lsq", "batch_norm=absorb")
    path = write_profile(profile, job, tmp_path / "model.onnx").path
    how, telling = WRONG_EXPORTS[case]
    model = onnx.load(path)
    how(model)
    onnx.save(model, path)
    failures = validate(program.student, job.lowered, path, [(images * 9,)]).failures
    assert any(telling in failure for failure in failures), failures


def test_an_output_that_only_loses_a_factor_is_caught(
    exported: tuple[Program, Export, Exported], images: Tensor
) -> None:
    """All codes and all predictions stay as they are."""
    program, job, written = exported
    model = onnx.load(written.path)
    (end,) = model.graph.output
    maker = next(n for n in model.graph.node if end.name in n.output)
    maker.output[list(maker.output).index(end.name)] = "unscaled"
    model.graph.initializer.append(numpy_helper.from_array(np.float32(1.3), "factor"))
    model.graph.node.append(onnx.helper.make_node("Mul", ["unscaled", "factor"], [end.name]))
    onnx.save(model, written.path)
    checked = validate(program.student, job.lowered, written.path, [(images,)])
    assert checked.deployed.agreement == 1
    assert any("output 0 is off by 30.000%" in failure for failure in checked.failures)
