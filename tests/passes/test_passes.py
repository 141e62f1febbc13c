"""What the passes do to small graphs, as printed and by numbers."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sqakd_fx.errors import PassError, RecipeError
from sqakd_fx.frontend.trace import trace
from sqakd_fx.ir.pass_manager import PassResult, run_passes
from sqakd_fx.passes.canonicalize import Canonicalize
from sqakd_fx.passes.fold_batch_norm import FoldBatchNorm
from sqakd_fx.passes.insert_quantizers import InsertQuantizers
from sqakd_fx.program import build_program
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.quant.quantizer import Quantizer
from sqakd_fx.recipe import resolve_recipe


class ManyForms(nn.Module):
    """The same operations as module, function, method, operator and in-place call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding="same")
        self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu_()
        y = F.conv2d(x, self.weight, padding=1, bias=None)
        y += x
        y = self.dropout(y.add(x))
        return self.fc(F.relu(y).mean((2, 3)))


def traced(model: nn.Module, x: Tensor):
    return trace(model.eval(), x).graph_module


def calls(graph_module) -> list[str]:
    return [
        getattr(n.target, "__name__", str(n.target))
        for n in graph_module.graph.nodes
        if n.op in ("call_function", "call_module", "call_method")
    ]


def test_every_form_of_an_operation_becomes_one(images: Tensor) -> None:
    model = ManyForms()
    wanted = model.eval()(images)
    result = run_passes(traced(model, images), [Canonicalize()])
    assert calls(result.graph_module) == [
        "conv2d", "relu", "conv2d", "add", "add", "relu", "mean", "linear",
    ]  # fmt: skip
    assert torch.equal(result.graph_module(images), wanted)


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, bias=True, groups=3)
        self.bn = nn.BatchNorm2d(6)
        self.up = nn.ConvTranspose2d(6, 4, 2, 2)
        self.up_bn = nn.BatchNorm2d(4)
        self.grouped_up = nn.ConvTranspose2d(4, 6, 2, 2, groups=2)
        self.grouped_bn = nn.BatchNorm2d(6)
        self.late = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 5)
        self.fc_bn = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(x)))
        x = self.grouped_bn(self.grouped_up(self.up_bn(self.up(x))))
        x = self.late(torch.relu(x)).mean((2, 3))
        return self.fc_bn(self.fc(x))


def test_batch_norm_is_folded_into_every_kind_of_layer(images: Tensor) -> None:
    torch.manual_seed(0)
    model = Norms()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    model.eval()
    wanted = model.double()(images.double())
    model.float()
    result = run_passes(traced(model, images), [Canonicalize(), FoldBatchNorm()])
    assert calls(result.graph_module).count("late") == 1
    assert not any("bn" in name for name in calls(result.graph_module))
    got = result.graph_module(images).double()
    assert (got - wanted).abs().max() / wanted.abs().max() < 1e-5
    (note,) = result.log[-1].notes
    assert "late" in note.node
    assert "relu" in note.reason


def test_folding_refuses_a_graph_in_training_mode(images: Tensor) -> None:
    graph_module = traced(Norms(), images).train()
    with pytest.raises(PassError, match=r"fold_batch_norm: .*eval"):
        run_passes(graph_module, [FoldBatchNorm()])


@dataclass(frozen=True)
class Faulty:
    """A pass with a bug: it fails, or leaves a graph that does not run or gives something else."""

    rewrite: Callable[[fx.GraphModule], None]
    name: str = "faulty"

    def requires(self, graph_module: fx.GraphModule) -> None: ...

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        self.rewrite(graph_module)
        return PassResult(graph_module, changed=True)

    def ensures(self, result: PassResult) -> None: ...


def raises_key_error(graph_module: fx.GraphModule) -> None:
    graph_module.graph.find_nodes(op="placeholder")[0].meta["not there"]


def erases_a_node_in_use(graph_module: fx.GraphModule) -> None:
    graph_module.graph.erase_node(graph_module.graph.find_nodes(op="call_module")[0])


def picks_out_of_range(graph_module: fx.GraphModule) -> None:
    (result,) = graph_module.graph.output_node().all_input_nodes
    with graph_module.graph.inserting_after(result):
        last = graph_module.graph.call_function(operator.getitem, (result, 1000))
    graph_module.graph.output_node().replace_input_with(result, last)


def doubles_the_output(graph_module: fx.GraphModule) -> None:
    (result,) = graph_module.graph.output_node().all_input_nodes
    with graph_module.graph.inserting_after(result):
        twice = graph_module.graph.call_function(operator.mul, (result, 2))
    graph_module.graph.output_node().replace_input_with(result, twice)


@pytest.mark.parametrize(
    ("rewrite", "said"),
    [
        (raises_key_error, r"^pass faulty cannot rewrite the model \(KeyError: 'not there'\)"),
        (erases_a_node_in_use, r"^pass faulty cannot rewrite the model \(RuntimeError: Tried to"),
        (picks_out_of_range, r"^the model does not run after pass faulty \(IndexError: index"),
        (doubles_the_output, r"^pass faulty changes what the model computes by \d"),
    ],
)
def test_a_faulty_pass_is_told_by_name(
    rewrite: Callable[[fx.GraphModule], None], said: str, images: Tensor
) -> None:
    graph_module = traced(ManyForms(), images)
    with pytest.raises(PassError, match=said + ".*: try --set frontend=export"):
        run_passes(graph_module, [Faulty(rewrite)], probe=lambda graph: graph(images))


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
