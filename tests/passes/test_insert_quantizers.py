"""Where quantizers stand, at how many bits, and why elsewhere there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_graphs import before_and_after, traced
from torch import Tensor, nn
from torch.nn import functional as F

from sqakd_fx.errors import RecipeError
from sqakd_fx.ir.pass_manager import run_passes
from sqakd_fx.passes.canonicalize import Canonicalize
from sqakd_fx.passes.insert_quantizers import InsertQuantizers
from sqakd_fx.program import build_program
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.quant.quantizer import Quantizer, quantizers_of
from sqakd_fx.recipe.resolution import resolve_recipe


class Normalized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


def test_weights_alone_are_quantized_in_the_student_that_runs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)).eval()
    x = torch.randn(2, 3, 4, 4)
    recipe = resolve_recipe("w4a4", override=[{"match": "*", "float": "activations"}])
    program = build_program(model, (x,), recipe)
    calibrate(program.student, [(x,)], method="minmax")
    assert [q.role for q in quantizers_of(program.student).values()] == ["weight", "weight"]
    assert not torch.equal(program.student(x), model(x))


def test_inputs_and_weights_are_quantized_and_a_result_behind_its_batch_norm_and_clip(
    images: Tensor,
) -> None:
    insertion = InsertQuantizers(resolve_recipe("w4a4"))
    before, after = before_and_after(Normalized(), images, Canonicalize(), insertion)
    assert "quantizer" not in before
    assert after.splitlines() == [
        "x_output_quantizer = self.x.output_quantizer(x)",
        "conv_weight = self.conv.weight",
        "conv_weight_quantizer = self.conv.weight_quantizer(conv_weight)",
        "conv = torch.conv2d(x_output_quantizer, conv_weight_quantizer, None, (1, 1), (0, 0), (1, 1), 1)",
        "bn = self.bn_absorbed(conv, conv_weight)",
        "relu = torch.nn.functional.relu(bn)",
        "relu_output_quantizer = self.relu.output_quantizer(relu)",
        "return relu_output_quantizer",
    ]


def test_disabled_quantizers_change_nothing_bit_for_bit(
    residual_net: nn.Module, images: Tensor
) -> None:
    result = run_passes(
        traced(residual_net, images),
        [Canonicalize(), InsertQuantizers(resolve_recipe("w4a4"))],
        probe=lambda graph: graph(images),
    )
    assert [entry.difference for entry in result.log] == [0.0, 0.0]


def quantizers(result) -> dict[str, int]:
    return {
        n.target: result.graph_module.get_submodule(n.target).bits
        for n in result.graph_module.graph.nodes
        if n.op == "call_module" and "quantizer" in str(n.target)
    }


def inserted(model: nn.Module, x: Tensor, *settings: str, bits: str = "w4a4"):
    recipe = resolve_recipe(bits, settings=settings)
    return run_passes(traced(model, x), [Canonicalize(), InsertQuantizers(recipe)])


def test_a_residual_stream_has_8_bits_and_what_reads_it_fewer(
    residual_net: nn.Module, images: Tensor
) -> None:
    found = quantizers(inserted(residual_net, images))
    assert found["x.output_quantizer"] == 8
    assert found["conv.weight_quantizer"] == 8
    assert found["layers.0.conv1.weight_quantizer"] == 4
    assert found["layers.0.bn2_output_quantizer"] == 8
    assert found["fc.weight_quantizer"] == 8


@pytest.mark.parametrize(("first_last", "learns"), [("8bit", False), ("same", True)])
def test_the_range_of_an_input_learns_below_8_bits_only(
    residual_net: nn.Module, images: Tensor, first_last: str, learns: bool
) -> None:
    program = build_program(residual_net, images, resolve_recipe("w4a4", first_last=first_last))
    student = program.student.train()
    calibrate(student, [(images,)])
    student(images).square().sum().backward()
    having = {name for name, p in student.named_parameters() if p.grad is not None}
    assert ("x.output_quantizer.step" in having) == learns
    assert "layers.0.relu_1.output_quantizer.step" in having


class Concat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 4, 1)
        self.right = nn.Conv2d(3, 4, 1)
        self.out = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.left(x).relu(), F.max_pool2d(self.right(x), 1)], 1)
        return self.out(y)


def test_tensors_that_are_concatenated_share_one_quantizer(images: Tensor) -> None:
    result = inserted(Concat(), images)
    targets = [
        n.target
        for n in result.graph_module.graph.nodes
        if n.op == "call_module" and str(n.target).endswith("output_quantizer")
    ]
    assert len(targets) == 4  # the input, the two that meet, and the result
    assert len(set(targets)) == 3


def test_what_stays_in_float_has_a_reason(images: Tensor) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.scale = nn.Conv2d(3, 4, 1)
            self.alone = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            weight = self.scale.weight * x.mean()
            return F.conv2d(x, weight) + F.gelu(self.conv(x)) + self.alone(x[0])

    notes = {n.node: n.reason for n in inserted(Odd(), images).log[-1].notes}
    assert "computed from data" in notes["conv2d"]
    assert "float" in notes["gelu"]
    assert "no batch axis" in notes["alone"]


def test_a_batch_norm_stays_in_float_with_the_layer_in_front_of_it(
    residual_net: nn.Module, images: Tensor
) -> None:
    kept = 'override=[{match="layers.0.conv1", float=true}]'
    compiled = inserted(residual_net, images, kept)
    notes = {n.node: n.reason for n in compiled.log[-1].notes}
    assert "as layers_0_conv1 in front" in notes["layers_0_bn1"]
    (norm,) = compiled.graph_module.graph.find_nodes(op="call_module", target="layers.0.bn1")
    assert norm.args[0].name == "layers_0_conv1"


@pytest.mark.parametrize(
    "kept",
    [
        {"override": [{"match": "layers.1.short.0", "float": True}]},
        {"float_modules": ["layers.1.short"]},
    ],
)
def test_what_a_float_layer_reads_is_not_as_narrow_as_what_others_read(
    residual_net: nn.Module, images: Tensor, kept: dict[str, Any]
) -> None:
    program = build_program(residual_net, images, resolve_recipe("w2a2", **kept))
    found = {n: m.bits for n, m in program.student.named_modules() if isinstance(m, Quantizer)}
    assert found["layers.0.relu_2.output_quantizer"] == 8
    assert found["layers.0.relu_2.quantizer_2bit"] == 2


def test_a_float_layer_behind_a_concatenation_reads_all_of_it_at_8_bits(images: Tensor) -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
            self.c, self.d, self.joint = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            a, b = torch.relu(self.a(x)), torch.relu(self.b(x))
            return self.c(a) + self.d(b) + self.joint(torch.cat([a, b], 1))

    settings = ('override=[{match="joint", float=true}]', "first_last=same")
    found = quantizers(inserted(Joined(), images, *settings, bits="w2a2"))
    assert found["relu.output_quantizer"] == found["relu_1.output_quantizer"] == 8


def test_overrides_choose_bits_and_float_by_glob(residual_net: nn.Module, images: Tensor) -> None:
    recipe = resolve_recipe(
        {
            "preset": "w4a4",
            "override": [
                {"match": "layers.1.*", "weight_bits": 3},
                {"match": "layers.0.conv1", "float": True},
            ],
        }
    )
    result = run_passes(traced(residual_net, images), [Canonicalize(), InsertQuantizers(recipe)])
    found = quantizers(result)
    assert found["layers.1.conv2.weight_quantizer"] == 3
    assert "layers.0.conv1.weight_quantizer" not in found


def test_an_override_that_matches_nothing_suggests_names(
    residual_net: nn.Module, images: Tensor
) -> None:
    recipe = resolve_recipe({"override": [{"match": "layer.0.conv1", "weight_bits": 3}]})
    with pytest.raises(RecipeError, match=r"layer\.0\.conv1.*layers\.0\.conv1"):
        run_passes(traced(residual_net, images), [Canonicalize(), InsertQuantizers(recipe)])
