"""Inner features of student and teacher as one more term of the loss, still without labels.

    L = KL + w · Σ MSE( Q(s), t' ) / var(t')        t' = Q(t) or t

s is what the student quantizes at a place, t the teacher's tensor there, and Q the student's own quantizer with
its current range. With Q(t) no difference remains that the student could not close (SQuaT, AISTATS 2026); t as it
is does not follow a range that has become too narrow. The place comes from the graph: an activation quantizer
whose tensor the teacher's graph has under the same name. w stays, or falls evenly to 0 over the first share of the
steps: with few bits the teacher's features are a way in, and later out of reach.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from sqakd_fx.diagnostics.batch_errors import call
from sqakd_fx.diagnostics.wording import no_effect
from sqakd_fx.ir import meta
from sqakd_fx.ir.op_table import Kind, shape_of
from sqakd_fx.quant.quantizer import Quantizer
from sqakd_fx.recipe.keys import Recipe
from sqakd_fx.training.losses import distillation_loss, share_of_relative_error


@dataclass(frozen=True)
class TrainingPair:
    """Student and teacher as a step calls them, the loss of their two outputs, and what a user should know.

    With `inner` both give (output, features).
    """

    student: nn.Module
    teacher: nn.Module
    loss: Callable[[Any, Any], Tensor]
    note: str | None = None
    inner: bool = False

    def teacher_output(self, *inputs: Any) -> Any:
        """What the float model itself returns."""
        found = call(self.teacher, *inputs)
        return found[0] if self.inner else found


def training_pair(student: fx.GraphModule, teacher: nn.Module, recipe: Recipe) -> TrainingPair:
    """The pair as it is, or with inner features where the recipe has a `feature_weight`.

    Graphs with features share all modules and parameters with the ones given. Where the two graphs have no
    tensor in common that the student quantizes, the pair is as it is, with a note.
    """
    outputs = distillation_loss(recipe)
    if not recipe.feature_weight:
        return TrainingPair(student, teacher, outputs)
    if not isinstance(teacher, fx.GraphModule):
        note = no_effect("feature_weight", "the teacher is no traced graph")
        return TrainingPair(student, teacher, outputs, note)
    places = feature_places(student, teacher, recipe.features)
    if not places:
        note = no_effect("feature_weight", "no tensor inside the network is quantized")
        return TrainingPair(student, teacher, outputs, note)
    seen_as = [
        student.get_submodule(str(quantized.target))
        if recipe.feature_target == "quantized"
        else nn.Identity()
        for quantized, _ in places
    ]
    weight = torch.tensor(recipe.feature_weight, device=next(student.buffers()).device)
    return TrainingPair(
        _exposing(student, [quantized for quantized, _ in places]),
        _exposing(teacher, [theirs for _, theirs in places]),
        FeatureLoss(outputs, seen_as, weight),
        inner=True,
    )


def feature_places(
    student: fx.GraphModule, teacher: fx.GraphModule, which: str
) -> list[tuple[fx.Node, fx.Node]]:
    """(quantizer node of the student, node of the teacher) pairs, in graph order.

    `which`: "late" is the last one with more than two axes; "sums" are all behind residual sums, or
    "late" where there are none.
    """
    theirs = {node.name: node for node in teacher.graph.nodes if node.op != "placeholder"}
    modules = dict(student.named_modules())
    inner = [
        (node, theirs[str(node.args[0])])
        for node in student.graph.nodes
        if node.op == "call_module"
        and isinstance(modules[str(node.target)], Quantizer)
        and modules[str(node.target)].role == "activation"
        and str(node.args[0]) in theirs
    ]
    sums = [pair for pair in inner if _is_sum(pair[0].args[0])]
    if which == "sums" and sums:
        return sums
    wide = [pair for pair in inner if len(shape_of(pair[1]) or ()) > 2]
    return (wide or inner)[-1:]


def _is_sum(node: Any) -> bool:
    """True for a residual sum, with or without the activation behind it."""
    return any(meta.arithmetic(one) is Kind.SUM for one in (node, *node.all_input_nodes[:1]))


def _exposing(graph_module: fx.GraphModule, nodes: Sequence[fx.Node]) -> fx.GraphModule:
    """A graph over the same modules that returns (output, features)."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(graph_module.graph, copies)
    graph.output((output, tuple(copies[node] for node in nodes)))
    made = fx.GraphModule(graph_module, graph)
    made.train(graph_module.training)
    return made


class FeatureLoss(nn.Module):
    """The equation at the top of this file, of two (output, features) pairs."""

    def __init__(
        self,
        outputs: Callable[[Any, Any], Tensor],
        seen_as: Sequence[nn.Module],
        weight: Tensor,
    ) -> None:
        super().__init__()
        self.outputs = outputs
        self.weight: Tensor
        self.register_buffer("weight", weight)  # a tensor, so that a recorded step sees it change
        self.seen_as = tuple(seen_as)  # a tuple: quantizers belong to the student

    def forward(self, student: Any, teacher: Any) -> Tensor:
        loss = self.outputs(student[0], teacher[0])
        for seen_as, own, other in zip(self.seen_as, student[1], teacher[1], strict=True):
            with torch.no_grad():
                wanted = seen_as(other)
            loss = loss + self.weight * share_of_relative_error(own, wanted)
        return loss


def fading_features(loss: FeatureLoss, recipe: Recipe) -> Callable[[int, int], None]:
    """What lets the weight of features fall evenly to 0 over the recipe's `feature_fade` of the steps."""

    def set_weight(step: int, total: int) -> None:
        left = max(1 - step / (recipe.feature_fade * total), 0.0)
        loss.weight.fill_(recipe.feature_weight * left)

    return set_weight
