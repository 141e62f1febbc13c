"""Losses of outputs by shape, by name, and with a share of labels; references in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from sqakd_fx import quantize
from sqakd_fx.errors import RecipeError, SourceError
from sqakd_fx.recipe.keys import Recipe
from sqakd_fx.recipe.resolution import resolve_recipe
from sqakd_fx.training.losses import check_output_settings, cross_entropy, distillation_loss

ROWS = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
CLASSES = torch.arange(64) % 4


class Heads(nn.Module):
    """Class scores, an embedding, a regression and a mask, in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.scores = nn.Linear(6, 8), nn.Linear(8, 4)
        self.embedding, self.size = nn.Linear(8, 5), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = torch.relu(self.body(x))
        return {
            "scores": self.scores(y),
            "aux": {"embedding": self.embedding(y), "size": self.size(y)},
        }


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def kl(student: Tensor, teacher: Tensor, axis: int, temperature: float = 4.0) -> Tensor:
    p = (teacher.double() / temperature).softmax(axis)
    q = (student.double() / temperature).softmax(axis)
    return temperature**2 * (p * (p.log() - q.log())).sum(axis).mean()


def relative(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = student.double(), teacher.double()
    return ((s - t) ** 2).mean() / ((t - t.mean()) ** 2).mean()


def with_loss(**settings: Any) -> Recipe:
    return resolve_recipe("w4a4", **settings)


@pytest.mark.parametrize(
    ("shape", "axis"), [((5, 4), 1), ((5, 4, 3, 3), 1), ((5, 7, 4), 2), ((5, 4, 2, 3, 3), 1)]
)
def test_class_scores_of_every_form_get_kl_over_their_classes(
    shape: tuple[int, ...], axis: int
) -> None:
    s, t = random(*shape, seed=1), random(*shape, seed=2)
    torch.testing.assert_close(
        distillation_loss(with_loss())(s, t).double(), kl(s, t, axis), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("shape", [(5, 1), (5,), (5, 1, 3, 3)])
def test_regressions_get_the_error_over_the_variance(shape: tuple[int, ...]) -> None:
    s, t = random(*shape, seed=1), random(*shape, seed=2)
    torch.testing.assert_close(
        distillation_loss(with_loss())(s, t).double(), relative(s, t), rtol=1e-5, atol=1e-6
    )


def outputs(seed: int) -> dict[str, Any]:
    return {
        "scores": random(5, 4, seed=seed),
        "aux": {"embedding": random(5, 8, seed=seed + 10), "size": random(5, 1, seed=seed + 20)},
    }


def test_several_outputs_are_summed_each_with_the_loss_that_its_name_or_its_shape_gives() -> None:
    s, t = outputs(1), outputs(2)
    recipe = with_loss(loss={"aux_emb*": "cosine", "aux_size": "none"})
    cosine = F.cosine_similarity(s["aux"]["embedding"].double(), t["aux"]["embedding"].double())
    torch.testing.assert_close(
        distillation_loss(recipe)(s, t).double(),
        kl(s["scores"], t["scores"], 1) + (1 - cosine).mean(),
        rtol=1e-5,
        atol=1e-6,
    )
    by_axis = with_loss(loss={"aux*": "none"}, class_axis={"scores": 0})
    torch.testing.assert_close(
        distillation_loss(by_axis)(s, t).double(),
        kl(s["scores"], t["scores"], 0),
        rtol=1e-5,
        atol=1e-6,
    )


def test_a_loss_for_an_output_that_is_not_there_names_those_that_are() -> None:
    with pytest.raises(RecipeError, match=r"'logits'.*scores, aux_embedding, aux_size"):
        check_output_settings(with_loss(loss={"logits": "kl"}), outputs(1))
    with pytest.raises(RecipeError, match="out every output"):
        check_output_settings(with_loss(loss="none"), outputs(1))


def test_labels_are_cross_entropy_over_the_classes_of_any_form() -> None:
    for shape, axis in (((5, 4), 1), ((5, 4, 3, 3), 1), ((5, 7, 4), 2)):
        scores = random(*shape, seed=1)
        classes = scores.argmax(axis).flip(0)
        log = scores.double().log_softmax(axis)
        expected = -log.gather(axis, classes.unsqueeze(axis)).mean()
        torch.testing.assert_close(
            cross_entropy(scores, classes).double(), expected, rtol=1e-5, atol=1e-6
        )


def test_labels_train_towards_other_classes_than_the_teachers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Heads()
    with torch.no_grad():
        theirs = net(ROWS)["scores"].argmax(1)
    settings = {"preset": "w8a8", "steps": 150, "batch_size": 32, "held_out": 0}
    settings |= {"learning_rate": 3e-2, "loss": {"aux*": "none"}}

    def agreeing(labels: float) -> float:
        result = quantize(
            net,
            TensorDataset(ROWS, CLASSES),
            example_inputs=ROWS[:8],
            recipe=settings | {"labels": labels},
            out=tmp_path / str(labels),
        )
        assert result is not None
        with torch.no_grad():
            return float((result.student(ROWS)["scores"].argmax(1) == CLASSES).float().mean())

    without = float((theirs == CLASSES).float().mean())
    assert agreeing(0.0) == pytest.approx(without, abs=0.1)
    assert agreeing(1.0) > without + 0.2


def test_labels_that_are_not_in_the_data_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="without a label"):
        quantize(
            Heads(),
            ROWS,
            example_inputs=ROWS[:8],
            recipe={"preset": "w8a8", "steps": 2, "labels": 1.0},
            out=tmp_path / "x",
        )
