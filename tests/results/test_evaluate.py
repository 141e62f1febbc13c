"""Accuracy on labelled data, and what is said where it cannot be measured."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sqakd_fx
from sqakd_fx.recipe import resolve_recipe

INPUTS = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))


def report(folder: Path, labels: Tensor, **more: Any) -> dict[str, Any]:
    """Of a linear classifier that is not trained."""
    torch.manual_seed(0)
    result = sqakd_fx.quantize(
        nn.Linear(6, 4),
        [INPUTS],
        example_inputs=INPUTS[:2],
        recipe=resolve_recipe("w8a8", steps=0),
        eval_data=[(INPUTS, labels)],
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
    ],
    ids=["labels of another shape", "metric that fails", "metric that is no number"],
)
def test_a_result_without_accuracy_says_why(
    tmp_path: Path, labels: Tensor, metric: Any, said: str
) -> None:
    found = report(tmp_path, labels, metric=metric)
    assert found["accuracy"] is None
    assert re.search(said, (tmp_path / "report.md").read_text())
    assert (tmp_path / "model.onnx").exists()
