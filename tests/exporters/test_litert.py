"""The form that LiteRT's converter takes: the program of `pt2e`, with weights that are quantized in the graph."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from default_sessions import NETWORKS
from export_jobs import job_of
from torch import Tensor, nn

from sqakd_fx.exporters.litert import quantized_weights
from sqakd_fx.exporters.profiles import write_profile
from sqakd_fx.exporters.pt2e import decomposed
from sqakd_fx.program import build_program, lower
from sqakd_fx.quant.calibration import calibrate

PER_CHANNEL = torch.ops.quantized_decomposed.dequantize_per_channel.default
QUANTIZES = (
    torch.ops.quantized_decomposed.quantize_per_channel.default,
    torch.ops.quantized_decomposed.quantize_per_tensor.default,
)


@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
@pytest.mark.parametrize("name", ["residual", "attention by hand", "mixed", "u-net", "cells"])
def test_it_computes_what_pt2e_computes_to_the_last_bit(name: str, bits: str) -> None:
    torch.manual_seed(0)
    model, inputs = NETWORKS[name]()
    program = build_program(model.eval(), inputs, bits)
    example = program.traced.call.flatten(inputs, {})
    calibrate(program.student, [example], method="minmax")
    before = decomposed(lower(program.student).graph_module, example)
    after = quantized_weights(copy.deepcopy(before))
    with torch.no_grad():
        wanted = torch.utils._pytree.tree_leaves(before(*example))
        got = torch.utils._pytree.tree_leaves(after(*example))
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_weights_are_floats_that_the_graph_quantizes(
    residual_net: nn.Module, images: Tensor
) -> None:
    _, job = job_of(residual_net, images, "w8a8")
    made = quantized_weights(decomposed(job.lowered, job.example))
    weights = made.graph.find_nodes(op="call_function", target=PER_CHANNEL)
    assert weights
    assert all(node.args[0].target in QUANTIZES for node in weights)
    assert not [x for x in made.buffers() if x.dtype in (torch.int8, torch.uint8)]


def test_the_file_runs_at_any_batch_size_and_says_how_to_go_on(
    residual_net: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    _, job = job_of(residual_net, images, "w8a8")
    exported = write_profile("litert", job, tmp_path / "model.pt2")
    assert "litert_torch.convert" in exported.notes[0]
    wanted, got = job.lowered(images[:3]), torch.export.load(exported.path).module()(images[:3])
    torch.testing.assert_close(got, wanted, rtol=0, atol=0.01 * float(wanted.std()))


class NormBehindCodes(nn.Module):
    """A LayerNorm is called as a module, and the zero point of what it gives lies beside its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(torch.relu(self.a(x))))


def test_no_8_bit_number_is_left_that_nothing_reads() -> None:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    program = build_program(NormBehindCodes().eval(), (x,), "w8a8")
    calibrate(program.student, [(x,)], method="minmax")
    made = quantized_weights(decomposed(lower(program.student).graph_module, (x,)))
    assert not [x for x in made.buffers() if x.dtype in (torch.int8, torch.uint8)]
