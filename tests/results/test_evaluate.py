"""Accuracy on labelled data, and what is said where it cannot be measured."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sqakd_fx
from sqakd_fx.errors import SourceError
from sqakd_fx.pipeline import Silent
from sqakd_fx.recipe.resolution import resolve_recipe

INPUTS = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))


def report(folder: Path, labels: Tensor, *, eval_data: Any = None, **more: Any) -> dict[str, Any]:
    """Of a linear classifier that is not trained."""
    torch.manual_seed(0)
    result = sqakd_fx.quantize(
        nn.Linear(6, 4),
        [INPUTS],
        example_inputs=INPUTS[:2],
        recipe=resolve_recipe("w8a8", steps=0),
        eval_data=[(INPUTS, labels)] if eval_data is None else eval_data,
        out=folder,
        **more,
    )
    return dict(result.report)


def classes() -> Tensor:
    torch.manual_seed(0)
    return nn.Linear(6, 4)(INPUTS).argmax(1)


def test_top_1_is_the_share_of_right_classes(tmp_path: Path) -> None:
    labels = classes()
    labels[:6] = (labels[:6] + 1) % 4
    assert report(tmp_path, labels)["accuracy"]["float"] == 75.0


@pytest.mark.parametrize(
    ("labels", "metric", "said"),
    [
        (classes()[:, None], None, r"the labels \(24, 1\) .* predictions \(24,\)"),
        (
            classes(),
            lambda outputs, targets: outputs.scores,
            r"metric\(\) failed .*test_evaluate.py:\d+\): .*outputs \(24, 4\) .*targets \(24,\)",
        ),
        (classes(), lambda outputs, targets: outputs, r"metric\(\) failed .*returns a number"),
        (classes(), lambda outputs, targets: float("nan"), r"metric\(\) failed .*it gave NaN"),
        (classes() + 3, None, r"hold \d, and the model has the classes 0 to 3"),
        (classes() - 4, None, r"hold -\d, and the model has the classes 0 to 3"),
        (classes() * float("nan"), None, r"hold nan, and the model has the classes 0 to 3"),
        (["cat"] * 24, None, r"the labels .*cat.* are not the classes"),
    ],
    ids=[
        "labels of another shape", "metric that fails", "metric that is no number", "metric that is NaN",
        "labels too large", "labels below 0", "labels that are NaN", "texts",
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_known_before_training(
    tmp_path: Path, labels: Tensor, metric: Any, said: str
) -> None:
    with pytest.raises(SourceError, match=said):
        report(tmp_path, labels, metric=metric)
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "evaluation data is empty"),
        (iter(()), "evaluation data is empty"),
        ([(INPUTS, None)], "evaluation data gives items without a label"),
        (["cat.png"], "evaluation data gives items of type str"),
        ([("cat.png", 1)], "evaluation data gives items of type str"),
    ],
    ids=["empty", "empty iterator", "a label of None", "texts", "texts with labels"],
)
def test_evaluation_data_that_cannot_be_used_is_known_before_training(
    tmp_path: Path, given: Any, said: str
) -> None:
    with pytest.raises(SourceError, match=said):
        report(tmp_path, classes(), eval_data=given)
    assert not list(tmp_path.rglob("step-*"))


def test_a_metric_that_fails_on_the_whole_leaves_a_result_that_says_why(tmp_path: Path) -> None:
    calls: list[int] = []

    def metric(outputs: Tensor, targets: Tensor) -> float:
        calls.append(len(outputs))
        return {1: 0.5}[len(calls)]

    found = report(tmp_path, classes(), metric=metric)
    assert found["accuracy"] is None
    assert re.search(r"metric\(\) failed \(KeyError", (tmp_path / "report.md").read_text())
    assert (tmp_path / "model.onnx").exists()


class TwoInputs(nn.Module):
    """Two inputs, two named outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        return {"logits": self.a(left) + self.b(right), "boxes": self.b(left - right)}


FORMS = {
    "a dict and labels": lambda x, y: ({"left": x, "right": x * 2}, y),
    "a dict with labels": lambda x, y: {"left": x, "right": x * 2, "labels": y},
    "a tuple and labels": lambda x, y: ((x, x * 2), y),
    "all behind one another": lambda x, y: (x, x * 2, y),
}


def test_a_metric_that_needs_all_samples_is_tried_on_all_of_them(tmp_path: Path) -> None:
    def metric(outputs: Tensor, targets: Tensor) -> float:
        return float(outputs[20].argmax() == targets[20])  # not in the first batch

    halves = list(zip(INPUTS.split(12), classes().split(12), strict=True))
    found = report(tmp_path, classes(), metric=metric, eval_data=halves)
    assert found["accuracy"]["float"] == 1.0


@pytest.mark.parametrize("form", FORMS)
def test_a_metric_is_given_all_outputs_and_labels_of_any_structure(
    form: str, tmp_path: Path
) -> None:
    by_name = "dict" in form
    labels = {"class": classes(), "box": torch.zeros(24, 4)}
    batches = [
        FORMS[form](INPUTS[part], {k: v[part] for k, v in labels.items()})
        for part in (slice(10), slice(10, 24))
    ]
    seen: list[tuple[int, int]] = []

    def metric(outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> float:
        seen.append((len(outputs["boxes"]), len(targets["box"])))
        return float((outputs["logits"].argmax(1) == targets["class"]).float().mean())

    example: Any = (INPUTS[:2], INPUTS[:2])
    result = sqakd_fx.quantize(
        TwoInputs(),
        batches,
        example_inputs={"left": INPUTS[:2], "right": INPUTS[:2]} if by_name else example,
        recipe=resolve_recipe("w8a8", steps=0),
        eval_data=batches,
        metric=metric,
        out=tmp_path / "out",
    )
    assert result is not None
    assert seen == [(10, 10), *[(24, 24)] * 3]
    x = INPUTS
    with torch.no_grad():
        share = (TwoInputs()(x, x * 2)["logits"].argmax(1) == labels["class"]).float().mean()
    assert result.report["accuracy"]["float"] == pytest.approx(float(share))
    shown = {row[0]: row[1] for row in result.report["summary"]}
    assert shown["metric"] == f"{float(share):.5g}"


def test_evaluation_data_without_labels_is_what_the_file_is_compared_on(tmp_path: Path) -> None:
    notes: list[str] = []

    class Told(Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    found = report(tmp_path, classes(), eval_data=[INPUTS[:20], INPUTS[20:]], observer=Told())
    assert found["accuracy"] is None
    assert found["outputs"][0]["samples"] == len(INPUTS)
    assert found["data"]["evaluation"] == "list of 2 batches"
    assert any("no labels" in note for note in notes)


@pytest.mark.parametrize(
    ("given", "metric", "said"),
    [
        ([INPUTS], lambda outputs, targets: 1.0, r"metric\(\) needs labels"),
        ([INPUTS, (INPUTS, classes())], None, "batch 1 of the evaluation data has labels, unlike"),
        (
            [(INPUTS, classes()), INPUTS],
            None,
            "batch 1 of the evaluation data has no labels, unlike",
        ),
    ],
    ids=["with a metric", "labels later", "labels at first"],
)
def test_labels_come_with_all_evaluation_data_or_with_none(
    tmp_path: Path, given: Any, metric: Any, said: str
) -> None:
    with pytest.raises(SourceError, match=said):
        report(tmp_path, classes(), eval_data=given, metric=metric)
