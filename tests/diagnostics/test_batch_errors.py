"""A batch that the model does not take is named in one sentence, and nothing else is printed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sqakd_fx
from sqakd_fx.errors import SourceError
from sqakd_fx.recipe.keys import Recipe
from sqakd_fx.recipe.resolution import resolve_recipe

RECIPE = resolve_recipe("w4a4", steps=4, calibration_batches=2, held_out=0, compile="never")


def _quantize(
    model: nn.Module, data: list[Any], folder: Path, recipe: Recipe = RECIPE, **more: Any
) -> None:
    sqakd_fx.quantize(
        model, data, example_inputs=data[0], recipe=recipe, out=folder, progress=False, **more
    )


def test_a_batch_of_another_width_is_named_where_training_meets_it(
    residual_net: nn.Module, images: Tensor, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        SourceError, match=r"batch 2 of epoch 0 .* float32 \(4, 2, 16, 16\).*to have 3"
    ):
        _quantize(residual_net, [images[:4], images[:4], images[:4, :2]], tmp_path)
    assert capfd.readouterr().err == ""


def test_an_index_without_a_row_is_named_where_ranges_are_found(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    ids = torch.tensor([[0, 1], [2, 3]])
    with pytest.raises(SourceError, match=r"batch 1 of the data, int64 \(2, 2\).*out of range"):
        _quantize(model, [ids, ids + 3], tmp_path)
    assert capfd.readouterr().err == ""


def test_what_was_trained_is_kept_where_an_evaluation_batch_is_of_another_width(
    residual_net: nn.Module, images: Tensor, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    labelled = [(images[:4], torch.zeros(4)), (images[:4, :2], torch.zeros(4))]
    with pytest.raises(SourceError, match=r"the evaluation data gives 'x' of 2×16×16"):
        _quantize(residual_net, [images[:4]], tmp_path, eval_data=labelled)
    assert list((tmp_path / "checkpoints").glob("step-*.safetensors"))
    assert (tmp_path / ".new" / "student.safetensors").exists()
    assert capfd.readouterr().err == ""


def test_a_batch_of_another_width_is_named_where_statistics_are_taken_again(
    residual_net: nn.Module, images: Tensor, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = resolve_recipe(RECIPE, steps=1, reestimate_batch_norm=3)
    with pytest.raises(SourceError, match=r"batch 2 of the data, float32 \(4, 2, 16, 16\)"):
        _quantize(residual_net, [images[:4], images[:4], images[:4, :2]], tmp_path, recipe)
    assert capfd.readouterr().err == ""
