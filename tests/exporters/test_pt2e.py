"""A torch.export program in quantized_decomposed operations: the integer program code by code, at any batch size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from default_sessions import NETWORKS
from export_jobs import job_of
from torch import Tensor, fx, nn

from sqakd_fx.errors import ExportError
from sqakd_fx.exporters.profiles import write_profile
from sqakd_fx.exporters.pt2e import decomposed
from sqakd_fx.program import build_program, lower
from sqakd_fx.quant.calibration import calibrate

QUANTIZE = torch.ops.quantized_decomposed.quantize_per_tensor.default
DEQUANTIZE = (
    torch.ops.quantized_decomposed.dequantize_per_tensor.default,
    torch.ops.quantized_decomposed.dequantize_per_channel.default,
)
EMBEDDING = nn.functional.embedding


def decomposed_of(model: nn.Module, inputs: tuple[Any, ...]) -> fx.GraphModule:
    program = build_program(model, inputs, "w8a8")
    example = program.traced.call.flatten(inputs, {})
    calibrate(program.student, [example], method="minmax")
    return decomposed(lower(program.student).graph_module, example)


class Recorded(fx.Interpreter):
    """Keeps the codes of a graph by the name of their node."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.codes: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and value.dtype in (torch.uint8, torch.int8):
            self.codes[n.name] = value.int()
        return value


@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
@pytest.mark.parametrize("name", ["residual", "attention by hand", "mixed", "u-net", "masked"])
def test_every_code_is_that_of_the_integer_program(name: str, bits: str) -> None:
    torch.manual_seed(0)
    model, inputs = NETWORKS[name]()
    program = build_program(model.eval(), inputs, bits)
    example = program.traced.call.flatten(inputs, {})
    calibrate(program.student, [example], method="minmax")
    lowered = lower(program.student).graph_module
    exact, made = Recorded(lowered), Recorded(decomposed(lowered, example))
    with torch.no_grad():
        exact.run(*example)
        made.run(*example)
    pairs = {
        node.name: made.codes[node.name] + 128
        for node in made.module.graph.find_nodes(op="call_function", target=QUANTIZE)
        if node.name in exact.codes
    }
    assert pairs
    total = sum(codes.numel() for codes in pairs.values())
    apart = [(codes - exact.codes[name]).abs() for name, codes in pairs.items()]
    off = sum(int((steps > 0).sum()) for steps in apart)
    assert (
        off <= 0.001 * total
    )  # a float32 sum may lie beside a tie, and a later sum reads a step as several
    assert max(int(steps.max()) for steps in apart) <= 3


def test_the_file_runs_at_any_batch_size_and_reads_no_own_operation(
    residual_net: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    _, job = job_of(residual_net, images, "w8a8")
    exported = write_profile("pt2e", job, tmp_path / "model.pt2")
    loaded = torch.export.load(exported.path)
    assert not [n for n in loaded.graph.nodes if "sqakd_fx" in str(n.target)]
    wanted, got = job.lowered(images[:3]), loaded.module()(images[:3])
    torch.testing.assert_close(got, wanted, rtol=0, atol=0.01 * float(wanted.std()))


def test_codes_below_eight_bits_are_clamped_floats_between_two_pairs(
    residual_net: nn.Module, images: Tensor
) -> None:
    _, job = job_of(residual_net, images, "w4a4")
    made = decomposed(job.lowered, job.example)
    clamps = made.graph.find_nodes(op="call_function", target=torch.clamp)
    assert clamps
    assert all(user.target is QUANTIZE for clamp in clamps for user in clamp.users)
    dequantize = torch.ops.quantized_decomposed.dequantize_per_tensor.default
    assert all(clamp.args[0].target is dequantize for clamp in clamps)


@pytest.mark.parametrize("name", ["residual", "attention by hand", "cells"])
def test_every_reader_has_a_dequantize_of_its_own(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = NETWORKS[name]()
    made = decomposed_of(model.eval(), inputs)
    found = [node for node in made.graph.nodes if node.target in DEQUANTIZE]
    assert found
    assert all(len(node.users) == 1 for node in found)
    codes = [node.args[0] for node in found]
    assert len(set(codes)) < len(codes)  # some codes have several readers


class FloatBehind(nn.Module):
    """SiLU is computed in float, so the sums in front of it are not rounded; behind the last ones a ReLU is."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.c, self.d = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(torch.relu(self.a(torch.relu(x))))
        x = torch.relu(self.c(nn.functional.silu(x).mean((2, 3))))
        return self.d(x)


def test_only_layers_whose_sums_are_rounded_have_integer_weights() -> None:
    torch.manual_seed(0)
    made = decomposed_of(FloatBehind().eval(), (torch.randn(4, 3, 8, 8),))
    layers = [
        node
        for node in made.graph.nodes
        if node.target in (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default)
    ]
    assert len(layers) == 4
    rounded = [all(user.target is QUANTIZE for user in layer.users) for layer in layers]
    assert rounded == [layer.args[1].target in DEQUANTIZE for layer in layers]
    assert True in rounded
    assert False in rounded


def test_rows_of_a_table_are_gathered_as_codes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    ids = torch.randint(50, (4, 6))
    program = build_program(model.eval(), (ids,), "w8a8")
    calibrate(program.student, [(ids,)], method="minmax")
    lowered = lower(program.student).graph_module
    made = decomposed(lowered, (ids,))
    tables = [node.args[1] for node in made.graph.find_nodes(op="call_function", target=EMBEDDING)]
    assert [made.get_buffer(str(table.target)).dtype for table in tables] == [
        torch.int8,
        torch.float32,
    ]
    with torch.no_grad():
        torch.testing.assert_close(made(ids), lowered(ids), rtol=1e-6, atol=1e-6)


def test_what_was_trained_channels_last_is_stored_contiguous(
    residual_net: nn.Module, images: Tensor
) -> None:
    _, job = job_of(residual_net.to(memory_format=torch.channels_last), images, "w8a8")
    for stored in job.lowered.buffers():
        if stored.ndim == 4:
            stored.data = stored.data.contiguous(memory_format=torch.channels_last)
    made = decomposed(job.lowered, job.example)
    assert all(stored.is_contiguous() for stored in made.buffers())


class ScaledByAConstant(nn.Module):
    """A layer scale on a layer that is used twice cannot be folded: the constant is stored as codes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.scale = nn.Parameter(torch.linspace(0.1, 1, 8).reshape(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = x + self.scale * self.b(x)
        return self.b(x + self.scale * self.b(torch.relu(x)))


@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
def test_a_stored_activation_is_what_its_codes_stand_for(bits: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    _, job = job_of(ScaledByAConstant().eval(), x, bits)
    wanted, got = job.lowered(x), decomposed(job.lowered, job.example)(x)
    assert [n for n in job.lowered.graph.nodes if n.op == "get_attr" and "codes" in str(n.target)]
    torch.testing.assert_close(got, wanted, rtol=0, atol=0.02 * float(wanted[0].std()))


class UnevenAverage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.pool = nn.Conv2d(3, 8, 3), nn.AvgPool2d(2, ceil_mode=True)
        self.b = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.pool(self.a(x)))


def test_an_operation_without_such_a_form_is_refused_by_name(tmp_path: Path) -> None:
    _, job = job_of(UnevenAverage().eval(), torch.randn(4, 3, 9, 9), "w8a8")
    with pytest.raises(ExportError, match=r"average_pool\w* pads more at one end"):
        write_profile("pt2e", job, tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("pads", [(1, 1, 1, 1), (0, 1, 0, 1)])
def test_a_padded_multiplier_and_groups_give_the_same_outputs(pads: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.ZeroPad2d(pads), nn.Conv2d(8, 32, 3, groups=8), nn.ReLU(),
        nn.ConvTranspose2d(32, 32, 2, 2, groups=32), nn.ReLU(), nn.Conv2d(32, 16, 1, groups=8),
    )  # fmt: skip
    images = torch.randn(4, 3, 8, 8)
    _, job = job_of(model.eval(), images, "w8a8")
    with torch.no_grad():
        wanted, got = job.lowered(images), decomposed(job.lowered, (images,))(images)
    assert torch.allclose(got, wanted, atol=1e-4)
