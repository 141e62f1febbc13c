"""An output that joins boxes and scores is taken for values, and each of its parts counts alike."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sqakd_fx.errors import RecipeError
from sqakd_fx.frontend.joined_outputs import Parts, unlike_parts
from sqakd_fx.frontend.trace import trace
from sqakd_fx.ir import meta
from sqakd_fx.ir.outputs import relative_errors
from sqakd_fx.ir.pass_manager import run_passes
from sqakd_fx.mixed_precision.sensitive import tolerances_of
from sqakd_fx.passes.propagate_shapes import PropagateShapes
from sqakd_fx.program import build_program
from sqakd_fx.recipe.resolution import resolve_recipe
from sqakd_fx.results.against_float import Sums
from sqakd_fx.training.held_out import agreement
from sqakd_fx.training.losses import check_output_settings, distillation_loss

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Detector(nn.Module):
    """Three levels of a detector with four numbers of a box and five scores for each pixel."""

    def __init__(self, join: Callable[[list[Tensor]], Tensor]) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.Conv2d(3, 9, 3, 2**k, 1) for k in (0, 1, 2))
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.join([level(x) for level in self.levels])


def boxes_above_scores(levels: list[Tensor]) -> Tensor:
    """As YOLOv8: (N, 4 + classes, anchors)."""
    boxes, scores = torch.cat([x.flatten(2) for x in levels], 2).split((4, 5), 1)
    return torch.cat((boxes.relu() * 16.0, scores.sigmoid()), 1)


def rows_of_levels(levels: list[Tensor]) -> Tensor:
    """As YOLOv5: (N, anchors, 4 + classes), with gates in the boxes' own formulas."""
    found = []
    for x in levels:
        xy, wh, scores = x.permute(0, 2, 3, 1).contiguous().sigmoid().split((2, 2, 5), 3)
        row = torch.cat((xy * 2 - 0.5, (wh * 2) ** 2 * 16, scores), 3)
        found.append(row.reshape(len(x), -1, 9))
    return torch.cat(found, 1)


def objects_above_boxes_above_classes(levels: list[Tensor]) -> Tensor:
    """As FastestDet: (N, 1 + 4 + classes, anchors), with a softmax over the classes."""
    known = torch.cat([x.flatten(2) for x in levels], 2)
    found, boxes, classes = known.split((1, 4, 4), 1)
    return torch.cat((found.sigmoid(), boxes, classes.softmax(1)), 1)


def levels_of_maps(levels: list[Tensor]) -> Tensor:
    """As YOLOX: (N, anchors, 4 + classes) of maps that hold boxes and scores."""
    maps = [torch.cat((x[:, :4], x[:, 4:].sigmoid()), 1) for x in levels]
    return torch.cat([x.reshape(len(x), 9, -1) for x in maps], 2).permute(0, 2, 1)


def transposed_levels_of_maps(levels: list[Tensor]) -> Tensor:
    maps = [torch.cat((x[:, :4], x[:, 4:].sigmoid()), 1) for x in levels]
    return torch.cat([x.flatten(2).transpose(1, 2)[:, 1:] for x in maps], 1)


def levels_of_anchors(levels: list[Tensor]) -> Tensor:
    """As YOLOv3: three anchors for each pixel, each with a box and a score."""
    found = []
    for x in levels:
        rows = x.unflatten(1, (1, 9)).permute(0, 1, 3, 4, 2)
        rows = torch.cat((rows[..., :4], rows[..., 4:].sigmoid()), -1)
        found.append(rows.view(len(x), -1, 9))
    return torch.cat(found, 1)


def pooled_maps(levels: list[Tensor]) -> Tensor:
    """(N, 4 + classes, H, W), the largest of neighbours."""
    x = levels[0]
    return torch.nn.functional.max_pool2d(torch.cat((x[:, :4], x[:, 4:].sigmoid()), 1), 2)


def raw_rows(levels: list[Tensor]) -> Tensor:
    """(N, anchors, 9) of a convolution's own values."""
    return torch.cat([x.flatten(2).transpose(1, 2) for x in levels], 1)


@pytest.mark.parametrize(
    "join",
    [
        boxes_above_scores,
        rows_of_levels,
        levels_of_maps,
        transposed_levels_of_maps,
        levels_of_anchors,
        pooled_maps,
    ],
)
def test_boxes_beside_scores_are_values_of_two_parts(
    join: Callable[[list[Tensor]], Tensor],
) -> None:
    program = build_program(Detector(join).eval(), IMAGES, "w8a8")
    (found,) = program.outputs
    assert (found.nature, found.axis, found.loss, found.parts) == ("values", None, "mse", (4, 5))
    assert "it joins values and probabilities, 4 and 5 wide" in found.sentence
    for graph_module in (program.teacher, program.student):
        assert meta.output_parts(graph_module.graph.output_node()) == {0: (4, 5)}


def test_boxes_between_objects_and_classes_are_one_part_of_three() -> None:
    join = objects_above_boxes_above_classes
    (found,) = build_program(Detector(join).eval(), IMAGES, "w8a8").outputs
    assert (found.nature, found.axis, found.parts) == ("values", None, (1, 4, 4))
    assert "it joins values and probabilities, 1, 4 and 4 wide" in found.sentence


def test_each_part_has_the_tolerance_of_an_output_of_its_own() -> None:
    outputs = build_program(Detector(boxes_above_scores).eval(), IMAGES, "w8a8").outputs
    assert tolerances_of(resolve_recipe("w8a8"), outputs) == (0.03, 0.12)
    outputs = build_program(
        Detector(objects_above_boxes_above_classes).eval(), IMAGES, "w8a8"
    ).outputs
    assert tolerances_of(resolve_recipe("w8a8"), outputs) == (0.12, 0.03, 0.12)


def test_parts_that_a_recipe_says_have_the_tolerance_of_values() -> None:
    recipe = resolve_recipe("w8a8", settings=["loss=mse", "parts={output=[2, 7]}"])
    outputs = build_program(Detector(raw_rows).eval(), IMAGES, recipe).outputs
    assert tolerances_of(recipe, outputs) == (0.03, 0.03)


def test_what_joins_values_of_one_kind_is_one_part() -> None:
    program = build_program(Detector(raw_rows).eval(), IMAGES, "w8a8")
    assert program.outputs[0].parts == ()
    assert meta.output_parts(program.teacher.graph.output_node()) == {}


def test_a_recipe_says_the_parts_itself() -> None:
    recipe = resolve_recipe("w8a8", settings=["loss=mse", "parts={output=[2, 7]}"])
    (found,) = build_program(Detector(raw_rows).eval(), IMAGES, recipe).outputs
    assert found.parts == (2, 7)


def test_each_part_counts_alike_in_loss_agreement_errors_and_report() -> None:
    program = build_program(Detector(boxes_above_scores).eval(), IMAGES, "w8a8")
    teacher = program.teacher(IMAGES).detach()
    boxes, scores = teacher.split((4, 5), 1)
    student = torch.cat((boxes * 1.001, scores * 1.2), 1)

    def over_variance(a: Tensor, b: Tensor) -> float:
        return float((a.double() - b.double()).square().mean() / b.double().var(correction=0))

    of_boxes, of_scores = over_variance(boxes * 1.001, boxes), over_variance(scores * 1.2, scores)
    loss = distillation_loss(program.recipe)(student, teacher)
    assert float(loss) == pytest.approx(of_boxes + of_scores, rel=1e-4)
    agreed = agreement(student, teacher, program.recipe)
    assert float(agreed) == pytest.approx(1 - (of_boxes + of_scores) / 2, rel=1e-4)
    (errors,) = relative_errors(student, teacher, {0: (4, 5)})
    assert errors == pytest.approx([0.001, 0.2], rel=1e-3)
    sums = Sums(program.outputs[0])
    for a, b in zip(student.split(2), teacher.split(2), strict=True):
        sums.add(a, b)
    assert sums.result().relative_error == pytest.approx(0.2, rel=1e-3)


class Growing(nn.Module):
    """Joins its own output to itself many times, as a loop that decodes does."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.sigmoid()
        for _ in range(600):
            rows = torch.cat((rows, rows[:, :, -1:] * 0.5), 2)[:, :, 1:]
        return rows


def test_a_long_chain_of_joins_is_followed_without_recursion() -> None:
    x = torch.randn(2, 3, 4)
    graph_module = run_passes(
        trace(Growing(), x).graph_module, [PropagateShapes((x,))]
    ).graph_module
    found = unlike_parts(graph_module.graph, dict(graph_module.named_modules()))
    (last,) = graph_module.graph.output_node().all_input_nodes
    assert last not in found
    assert Parts(-1, (4, 1), ("independent probabilities", "values")) in found.values()


@pytest.mark.parametrize(("parts", "said"), [([4, 7], "add up to 11"), ([9, 1], "add up to 10")])
def test_parts_that_fit_no_axis_are_refused(parts: list[int], said: str) -> None:
    recipe = resolve_recipe("w8a8", settings=["loss=mse", f"parts={{output={parts}}}"])
    with pytest.raises(RecipeError, match=said):
        check_output_settings(recipe, torch.zeros(2, 9, 5))


def test_parts_of_an_axis_that_the_sizes_do_not_tell_are_left_out() -> None:
    class Square(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat((x[:, :, :4].relu(), x[:, :, 4:].sigmoid()), 2)

    (found,) = build_program(Square().eval(), torch.randn(2, 9, 9), "w8a8").outputs
    assert found.parts == ()
