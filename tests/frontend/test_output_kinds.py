"""What an output is taken for, and which loss follows from that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sqakd_fx.frontend.output_kinds import OutputKind, class_axes, decide_outputs, with_outputs
from sqakd_fx.frontend.trace import trace
from sqakd_fx.recipe.resolution import resolve_recipe
from sqakd_fx.training.losses import judged_axis, output_loss

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ROWS = IMAGES.flatten(2).transpose(1, 2)


class Net(nn.Module):
    """A convolution of images, or a linear layer of rows, called `called`, and what `end` makes of it."""

    def __init__(self, width: int, end: Callable[[Tensor], Any], called: str = "last") -> None:
        super().__init__()
        self.end, self.called = end, called
        self.add_module(called, nn.Conv2d(3, width, 1))

    def forward(self, x: Tensor) -> Any:
        return self.end(self.get_submodule(self.called)(x))


def kinds(
    model: nn.Module, x: Tensor = IMAGES, labels: Any = None, **settings: Any
) -> tuple[OutputKind, ...]:
    recipe = resolve_recipe("w8a8", **settings)
    return decide_outputs(trace(model, (x,)).graph_module, (x,), recipe, labels)


def pooled(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def rows(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


OUTPUTS = {
    "a softmax": (Net(5, lambda x: pooled(x).softmax(1)), "probabilities", 1, "probabilities"),
    "a softmax over pixels' channels": (Net(5, lambda x: x.softmax(1)), "probabilities", 1, "probabilities"),
    "a log-softmax": (Net(5, lambda x: pooled(x).log_softmax(1)), "classes", 1, "kl"),
    "a sigmoid": (Net(5, lambda x: pooled(x).sigmoid()), "independent probabilities", None, "bce"),
    "a mask": (Net(1, torch.sigmoid), "independent probabilities", None, "bce"),
    "an image by a sigmoid": (Net(3, torch.sigmoid), "values", None, "mse"),
    "boxes by a sigmoid": (Net(4, lambda x: rows(x).sigmoid()), "values", None, "mse"),
    "unit vectors": (Net(5, lambda x: F.normalize(pooled(x))), "embedding", None, "cosine"),
    "hidden states": (Net(5, lambda x: F.layer_norm(rows(x), (5,))), "values", None, "mse"),
    "boxes": (Net(4, rows), "values", None, "mse"),
    "an image": (Net(3, lambda x: x), "values", None, "mse"),
    "a larger image": (Net(12, lambda x: F.pixel_shuffle(x, 2)), "values", None, "mse"),
    "one number": (Net(1, pooled), "values", None, "mse"),
    "flow, by the module's name": (Net(2, lambda x: x, "flow_head"), "values", None, "mse"),
    "masks, by the module's name": (Net(2, lambda x: x, "classifier"), "classes", 1, "kl"),
    "named logits": (Net(4, lambda x: {"logits": rows(x)}), "classes", 2, "kl"),
    "a named embedding": (Net(5, lambda x: {"imageEmbeds": pooled(x)}), "values", None, "mse"),
    "what nothing tells": (Net(5, pooled), "scores", 1, "kl+mse"),
    "maps that nothing tells": (Net(2, lambda x: x), "scores", 1, "kl+mse"),
}  # fmt: skip


@pytest.mark.parametrize("case", OUTPUTS)
def test_the_loss_follows_what_the_output_is(case: str) -> None:
    model, nature, axis, loss = OUTPUTS[case]
    (found,) = kinds(model)
    assert (found.nature, found.axis, found.loss) == (nature, axis, loss)


def test_each_output_of_a_detector_is_told_by_itself() -> None:
    def heads(x: Tensor) -> Any:
        return {
            "pred": (rows(x)[..., :3], rows(x)[..., 3:7]),
            "count": torch.arange(3),
            "iou": rows(x)[..., 7],
        }

    found = kinds(Net(8, heads))
    assert [(one.name, one.nature, one.index) for one in found] == [
        ("pred_0", "scores", 0),
        ("pred_1", "values", 1),
        ("iou", "scores", 3),
    ]
    assert class_axes(found) == {0: 2, 3: 1}


LABELS = {
    "class numbers": (Net(5, pooled), torch.tensor([4, 0, 3]), "classes", 1),
    "of each pixel": (Net(3, lambda x: x), torch.randint(3, (5, 8, 8)), "classes", 1),
    "of each token": (Net(4, rows), torch.randint(4, (5, 64)), "classes", 2),
    "numbers of the output's form": (Net(5, pooled), torch.randn(3, 5), "values", None),
    "beyond the classes": (Net(5, pooled), torch.tensor([7, 0]), "scores", 1),
}  # fmt: skip


@pytest.mark.parametrize("case", LABELS)
def test_labels_tell_what_the_first_output_is(case: str) -> None:
    model, labels, nature, axis = LABELS[case]
    (found,) = kinds(model, labels=labels)
    assert (found.nature, found.axis) == (nature, axis)


IMAGES6 = torch.randn(32, 6, generator=torch.Generator().manual_seed(3))


class FaceDetector(nn.Module):
    """Landmarks, a box, and probabilities of two classes, without a name."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.body(x)
        return x[:, :10] * 2, x[:, 10:14] * 2, x[:, 14:].softmax(1)


@pytest.mark.parametrize("labels", [None, torch.tensor([0, 1, 1])])
def test_beside_probabilities_of_its_own_a_model_gives_values(labels: Tensor | None) -> None:
    found = kinds(FaceDetector(), torch.randn(3, 6), labels)
    assert [one.nature for one in found] == ["values", "values", "probabilities"]
    assert [one.loss for one in found] == ["mse", "mse", "probabilities"]
    assert "output_2" in found[0].evidence


def test_labels_are_of_the_output_with_as_many_classes() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 10), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    found = kinds(Heads(), torch.randn(3, 6), torch.tensor([0, 2, 1]))
    assert [one.nature for one in found] == ["scores", "classes"]


class Voiceprint(nn.Module):
    """An embedding whose first number is often its largest."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 32)
        with torch.no_grad():
            self.layer.bias[0] += 2

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(self.layer(x), dim=1)  # type: ignore[no-any-return]


def test_an_embedding_beside_numbers_of_speakers_is_no_scores() -> None:
    torch.manual_seed(0)
    x, speakers = torch.randn(24, 8), torch.arange(24) % 4
    model = Voiceprint().eval()
    answers = [model(x)]
    first = answers[0].argmax(1) == 0
    assert int((first & (speakers == 0)).sum()) >= 4
    graph, recipe = trace(model, (x[:2],)).graph_module, resolve_recipe("w8a8")
    (found,) = decide_outputs(graph, (x[:2],), recipe, speakers, answers)
    assert found.nature == "embedding"


def test_scores_of_samples_that_are_all_of_one_class_are_its_classes() -> None:
    x, model = torch.randn(16, 8), nn.Linear(8, 5).eval()
    with torch.no_grad():
        model.bias[3] += 100
    graph, recipe = trace(model, (x[:2],)).graph_module, resolve_recipe("w8a8")
    (found,) = decide_outputs(graph, (x[:2],), recipe, torch.full((16,), 3), [model(x)])
    assert found.nature == "classes"


def test_labels_that_an_output_does_not_hit_more_often_than_by_chance_are_not_its_classes() -> None:
    model = nn.Linear(6, 40)
    graph, x = trace(model, (IMAGES6,)).graph_module, IMAGES6
    answers = [model(x)]
    right, others = answers[0].argmax(1), torch.arange(len(x))
    recipe = resolve_recipe("w8a8")
    (found,) = decide_outputs(graph, (x,), recipe, right, answers)
    assert found.nature == "classes"
    (found,) = decide_outputs(graph, (x,), recipe, others, answers)
    assert found.nature == "scores"


def test_what_the_recipe_says_of_an_output_holds() -> None:
    boxes = Net(4, lambda x: {"boxes": rows(x), "image": x[:, :3]})
    first, second = kinds(boxes, loss={"box*": "kl"})
    assert (first.loss, first.axis, second.loss) == ("kl", 2, "mse")
    (found, _) = kinds(boxes, loss={"boxes": "none"})
    assert (found.loss, found.nature) == ("none", "values")
    (found, _) = kinds(boxes, class_axis={"boxes": 1})
    assert (found.nature, found.axis, found.loss) == ("classes", 1, "kl")
    (scores,) = kinds(Net(5, pooled), loss="mse")
    assert (scores.axis, scores.loss) == (1, "mse")


def test_a_recipe_with_what_was_decided_decides_the_same_again() -> None:
    model = Net(
        7, lambda x: {"a[0]": rows(x)[..., :3], "b*": rows(x)[..., 3:], "logits": pooled(x)}
    )
    first = kinds(model)
    recipe = with_outputs(resolve_recipe("w8a8"), first)
    again = decide_outputs(trace(model, (IMAGES,)).graph_module, (IMAGES,), recipe)
    assert [(one.axis, one.loss) for one in again] == [(one.axis, one.loss) for one in first]
    for one in first:
        assert judged_axis(recipe, one.shape, one.name) == one.axis
        assert output_loss(recipe, one.shape, one.name) is not None


def test_the_line_for_an_output_names_the_recipe_line_that_changes_it() -> None:
    (found,) = kinds(Net(4, rows))
    assert found.sentence == (
        "output output (2, 64, 4): values (four numbers a row, as boxes have), loss mse; "
        'change it by loss = {"output" = "kl"}'
    )


def test_the_graph_is_not_changed() -> None:
    graph_module = trace(Net(5, pooled), (IMAGES,)).graph_module
    before = str(graph_module.graph)
    decide_outputs(graph_module, (IMAGES,), resolve_recipe("w8a8"))
    assert isinstance(graph_module, fx.GraphModule)
    assert str(graph_module.graph) == before
