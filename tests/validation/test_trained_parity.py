"""A program that is not the trained graph is caught where it first departs, and a clip between is followed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from export_jobs import job_of
from torch import Tensor, fx, nn

from sqakd_fx.exporters.profiles import write_profile
from sqakd_fx.ir.rewriting import get_attribute
from sqakd_fx.results.markdown import tensor_table
from sqakd_fx.validation.validate import validate

Change = Callable[[fx.GraphModule], object]

WRONG: dict[str, tuple[Change, str]] = {
    "a bias": (
        lambda program: get_attribute(program, "layers.0.conv2.bias").add_(40),
        "layers.0.bn2_quantized",
    ),
    "a weight": (
        lambda program: get_attribute(program, "layers.1.conv1.weight").mul_(-1),
        "layers.1.relu_3_quantized",
    ),
    "a zero point": (
        lambda program: get_attribute(program, "layers.0.bn2.zero_point").add_(1),
        "layers.0.bn2_quantized",
    ),
    "a scale by a hundredth": (
        lambda program: get_attribute(program, "layers.0.relu_1.scale").mul_(1.01),
        "layers.0.relu_1_quantized",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_program_that_is_not_the_trained_graph_is_caught_and_named(
    residual_net: nn.Module, images: Tensor, tmp_path: Path, case: str
) -> None:
    change, name = WRONG[case]
    program, job = job_of(residual_net, images, "w8a8", "lsq", "batch_norm=absorb")
    change(job.lowered)
    written = write_profile("container", job, tmp_path / "model.onnx")
    checked = validate(program.student, job.lowered, written.path, [(images,)])
    assert checked.failures[0].startswith(f"{name}, made by"), checked.failures
    assert "the trained graph and the integer program differ" in checked.failures[0]
    assert f"trained graph\n  first divergence: {name}" in tensor_table(checked)


def test_every_quantized_tensor_is_compared(
    residual_net: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    program, job = job_of(residual_net, images, "w2a2")
    written = write_profile("container", job, tmp_path / "model.onnx")
    checked = validate(program.student, job.lowered, written.path, [(images,), (images[:3],)])
    compared = {tensor.name: tensor.elements for tensor in checked.trained}
    assert compared == {tensor.name: tensor.elements for tensor in checked.runtimes[0].tensors}
    assert all(tensor.largest == 0 for tensor in checked.trained)
