"""What `inspect` prints: the graph after each stage, in every format, and why nodes are as they are."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from sqakd_fx.cli.explain import explain, show_explanation
from sqakd_fx.cli.graphs import SourceGraphs
from sqakd_fx.cli.inspect import show_difference, show_stage
from sqakd_fx.errors import RecipeError
from sqakd_fx.program import all_passes
from sqakd_fx.recipe.resolution import resolve_recipe
from sqakd_fx.source.source import Source


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(self.body(x), 1))


@pytest.fixture
def small() -> Source:
    torch.manual_seed(0)
    return Source(
        spec="small.py",
        name="small",
        model=Small().eval(),
        example_inputs=(torch.randn(2, 1, 4, 4),),
        example_kwargs={},
        train_data=None,
        eval_data=None,
        metric=None,
    )


def shown(source: Source, stage: str, form: str, capsys: pytest.CaptureFixture[str]) -> str:
    recipe = resolve_recipe("w4a4", batch_norm="absorb")
    show_stage(SourceGraphs(source, recipe), stage, form)
    return "\n".join(line.rstrip() for line in capsys.readouterr().out.strip().splitlines())


CODE = {
    "traced": """
def forward(self, x) -> _Any_:
    body_0_weight = getattr(self.body, "0").weight
    body_0 = torch.conv2d(x, body_0_weight, None, (1, 1), (0, 0), (1, 1), 1)
    body_1 = getattr(self.body, "1")(body_0)
    body_2 = torch.nn.functional.relu(body_1)
    flatten = torch.flatten(body_2, 1)
    head_weight = self.head.weight
    head_bias = self.head.bias
    head = torch._C._nn.linear(flatten, head_weight, head_bias)
    return head""",
    "folded": """
def forward(self, x) -> _Any_:
    body_0_weight_folded = getattr(self.body, "0").weight_folded
    body_0_bias_folded = getattr(self.body, "0").bias_folded
    body_0 = torch.conv2d(x, body_0_weight_folded, body_0_bias_folded, (1, 1), (0, 0), (1, 1), 1)
    body_2 = torch.nn.functional.relu(body_0)
    flatten = torch.flatten(body_2, 1)
    head_weight = self.head.weight
    head_bias = self.head.bias
    head = torch._C._nn.linear(flatten, head_weight, head_bias)
    return head""",
    "quantized": """
def forward(self, x) -> _Any_:
    x_output_quantizer = self.x.output_quantizer(x)
    body_0_weight = getattr(self.body, "0").weight
    body_0_weight_quantizer = getattr(self.body, "0").weight_quantizer(body_0_weight)
    body_0 = torch.conv2d(x_output_quantizer, body_0_weight_quantizer, None, (1, 1), (0, 0), (1, 1), 1)
    body_1 = getattr(self.body, "1_absorbed")(body_0, body_0_weight)
    body_2 = torch.nn.functional.relu(body_1)
    body_2_output_quantizer = getattr(self.body, "2").output_quantizer(body_2)
    flatten = torch.flatten(body_2_output_quantizer, 1)
    head_weight = self.head.weight
    head_bias = self.head.bias
    head_weight_quantizer = self.head.weight_quantizer(head_weight)
    head_bias_rounding = self.head.bias_rounding(head_bias, head_weight)
    head = torch._C._nn.linear(flatten, head_weight_quantizer, head_bias_rounding)
    return head""",
    "lowered": """
def forward(self, x):
    x_scale = self.x.scale
    x_zero_point = self.x.zero_point
    quantize_default = torch.ops.sqakd_fx.quantize.default(x, x_scale, x_zero_point, 0, 255)
    body_2_scale = getattr(self.body, "2").scale
    body_2_zero_point = getattr(self.body, "2").zero_point
    body_0_weight = getattr(self.body, "0").weight
    body_0_weight_scale = getattr(self.body, "0").weight_scale
    body_0_accumulator_scale = getattr(self.body, "0").accumulator_scale
    body_0_bias = getattr(self.body, "0").bias
    conv_default = torch.ops.sqakd_fx.conv.default(quantize_default, x_scale, x_zero_point, body_0_weight, body_0_weight_scale, body_0_accumulator_scale, body_0_bias, [1, 1], [0, 0], [1, 1], 1)
    requantize_default = torch.ops.sqakd_fx.requantize.default(conv_default, body_0_accumulator_scale, 1, body_2_scale, body_2_zero_point, 0, 255)
    flatten = torch.flatten(requantize_default, 1)
    head_weight = self.head.weight
    head_weight_scale = self.head.weight_scale
    head_accumulator_scale = self.head.accumulator_scale
    head_bias = self.head.bias
    linear_default = torch.ops.sqakd_fx.linear.default(flatten, body_2_scale, body_2_zero_point, head_weight, head_weight_scale, head_accumulator_scale, head_bias)
    dequantize_accumulator_default = torch.ops.sqakd_fx.dequantize_accumulator.default(linear_default, head_accumulator_scale, -1)
    return dequantize_accumulator_default""",
}

TREE = """\
small
├── x: input
├── x_output_quantizer: quantize  [8 bits lsq]
├── body
│   ├── 0
│   │   ├── body_0_weight: constant
│   │   ├── body_0_weight_quantizer: quantize weight  [8 bits lsq]
│   │   └── body_0: conv2d
│   ├── 1
│   │   └── body_1: batch_norm, absorbed
│   └── 2
│       ├── body_2: relu
│       └── body_2_output_quantizer: quantize  [8 bits lsq]
├── flatten: flatten
├── head
│   ├── head_weight: constant
│   ├── head_bias: constant
│   ├── head_weight_quantizer: quantize weight  [8 bits lsq]
│   ├── head_bias_rounding: round bias
│   └── head: linear
└── output: output"""

DIFFERENCE = """\
--- traced
+++ folded
@@ -1,8 +1,8 @@
 def forward(self, x) -> _Any_:
-    body_0_weight = getattr(self.body, "0").weight
-    body_0 = torch.conv2d(x, body_0_weight, None, (1, 1), (0, 0), (1, 1), 1)
-    body_1 = getattr(self.body, "1")(body_0)
-    body_2 = torch.nn.functional.relu(body_1)
+    body_0_weight_folded = getattr(self.body, "0").weight_folded
+    body_0_bias_folded = getattr(self.body, "0").bias_folded
+    body_0 = torch.conv2d(x, body_0_weight_folded, body_0_bias_folded, (1, 1), (0, 0), (1, 1), 1)
+    body_2 = torch.nn.functional.relu(body_0)
     flatten = torch.flatten(body_2, 1)
     head_weight = self.head.weight
     head_bias = self.head.bias"""


@pytest.mark.parametrize("stage", CODE)
def test_the_code_of_a_stage(small: Source, stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(small, stage, "code", capsys) == CODE[stage].strip()


def test_the_tree_follows_the_users_modules(
    small: Source, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shown(small, "quantized", "tree", capsys) == TREE


def test_the_table_has_whole_names_where_it_is_no_terminal(
    small: Source, capsys: pytest.CaptureFixture[str]
) -> None:
    row = "requantize_default │ requantize │ 2×2×2×2 │ 8 bits lsq │ body"
    table = shown(small, "lowered", "table", capsys)
    assert row.split() in [line.strip("│ ").split() for line in table.splitlines()]
    assert "…" not in table


def test_the_graph_as_dot_and_as_json_has_every_edge(
    small: Source, capsys: pytest.CaptureFixture[str]
) -> None:
    dot = shown(small, "quantized", "dot", capsys)
    nodes = json.loads(shown(small, "quantized", "json", capsys))["nodes"]
    edges = {f'"{source}" -> "{n["name"]}"' for n in nodes for source in n["inputs"]}
    assert {line.strip(" ;") for line in dot.splitlines() if "->" in line} == edges


def test_the_difference_of_two_stages_is_what_changed(
    small: Source, capsys: pytest.CaptureFixture[str]
) -> None:
    show_difference(SourceGraphs(small, resolve_recipe("w4a4")), "traced", "folded")
    assert capsys.readouterr().out.rstrip() == DIFFERENCE


def test_an_explanation_names_rule_recipe_bits_and_onnx_form(small: Source) -> None:
    program = SourceGraphs(small, resolve_recipe("w4a4")).program()
    (head,) = explain(program, "head")
    assert head["recipe"] == "first_last: the last layer has 8 bits"
    assert head["bits"] == "weight 8, activation 8"
    assert head["input flatten"] == "lsq, activation, 8 bits, per-tensor"
    assert head["in ONNX"].endswith("QGemm")
    assert [facts["node"] for facts in explain(program, "body")][-2:] == [
        "body_2",
        "body_2_output_quantizer",
    ]


@pytest.mark.parametrize(
    ("name", "near"), [("bodi", "body"), ("haed", "head"), ("body.9", "body.0")]
)
def test_an_unknown_node_is_answered_with_near_names(small: Source, name: str, near: str) -> None:
    with pytest.raises(RecipeError, match=rf"did you mean .*{near}"):
        show_explanation(SourceGraphs(small, resolve_recipe("w4a4")).program(), name, "table")


@pytest.mark.parametrize(
    ("match", "near"), [("bdy.*", r"body\.\*"), ("conv2", "conv2d"), ("hed", "head")]
)
def test_an_override_that_matches_nothing_is_answered_with_near_names(
    small: Source, match: str, near: str
) -> None:
    recipe = resolve_recipe("w4a4", override=[{"match": match, "weight_bits": 8}])
    with pytest.raises(RecipeError, match=rf"matches no layer: did you mean .*{near}"):
        show_stage(SourceGraphs(small, recipe), "quantized", "table")


@pytest.mark.parametrize("form", ["table", "tree", "code", "dot", "json"])
@pytest.mark.parametrize(
    ("stage", "after"),
    [
        ("traced", "stable_top_k"),
        ("folded", "fold_batch_norm"),
        ("quantized", "insert_quantizers"),
        ("lowered", "lower_to_integer"),
    ],
)
def test_a_stage_is_the_graph_behind_a_pass(
    small: Source, stage: str, after: str, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = shown(small, stage, form, capsys).replace(f'"stage": "{stage}"', f'"stage": "{after}"')
    assert shown(small, after, form, capsys) == wanted


OPTIONAL = (
    "cross_layer_equalization",
    "smooth_activations",
    "compensate_rounding",
    "correct_bias",
)


@pytest.mark.parametrize("name", OPTIONAL)
def test_a_pass_that_the_recipe_does_not_run_is_answered_with_its_keys(
    small: Source, name: str
) -> None:
    with pytest.raises(
        RecipeError, match=f"no pass {name} runs .* equalize, rounding and bias_correction"
    ):
        SourceGraphs(small, resolve_recipe("w4a4")).at(name)


def test_the_graph_behind_an_equalization_is_shown(small: Source) -> None:
    recipe = resolve_recipe("w4a4", settings=["equalize=weights"])
    graph_module, _ = SourceGraphs(small, recipe).at("cross_layer_equalization")
    assert "body_1" in graph_module.code


def test_every_pass_has_a_graph_to_show(small: Source, capsys: pytest.CaptureFixture[str]) -> None:
    graphs = {
        name: shown(small, name, "code", capsys) for name in all_passes() if name not in OPTIONAL
    }
    assert "self.head(flatten)" in graphs["decompose"]
    assert "linear(flatten, head_weight, head_bias)" in graphs["canonicalize"]
    assert "quantizer" not in graphs["stable_top_k"]
