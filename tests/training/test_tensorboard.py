"""Figures for TensorBoard, read back by TensorBoard itself."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import sqakd_fx
from sqakd_fx.errors import RecipeError
from sqakd_fx.training.progress import StepReport
from sqakd_fx.training.tensorboard import clear_scalars, scalar_log

REPORT = StepReport(20, 80, 0.5, 1e-3, 8.0, 7.5, None, None)


def read(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder)).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_every_figure_of_a_report_is_a_scalar_at_its_step(tmp_path: Path) -> None:
    with scalar_log(tmp_path) as log:
        log(REPORT)
        log(replace(REPORT, step=40, loss=0.25, agreement=0.75))
    assert read(tmp_path, "loss") == [(20, 0.5), (40, 0.25)]
    assert read(tmp_path, "steps_per_second") == [(20, 8.0), (40, 8.0)]
    assert read(tmp_path, "learning_rate") == [(s, pytest.approx(1e-3)) for s in (20, 40)]
    assert read(tmp_path, "agreement") == [(40, 0.75)]


def test_a_run_that_goes_on_or_back_hides_what_was_said_of_later_steps(tmp_path: Path) -> None:
    with scalar_log(tmp_path) as log:
        for step in (20, 40, 60):
            log(replace(REPORT, step=step, loss=1.0))
    with scalar_log(tmp_path) as resumed:
        for step, loss in ((40, 2.0), (60, 3.0), (60, 4.0), (80, 5.0)):
            resumed(replace(REPORT, step=step, loss=loss))
    assert read(tmp_path, "loss") == [(20, 1.0), (40, 2.0), (60, 4.0), (80, 5.0)]
    clear_scalars(tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_a_folder_nothing_is_written(tmp_path: Path) -> None:
    with scalar_log(None) as log:
        log(REPORT)
    assert not list(tmp_path.iterdir())


def test_without_the_package_the_run_ends_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(RecipeError, match=r"needs the package tensorboard.*sqakd-fx\[tensorboard"):
        sqakd_fx.quantize(
            nn.Linear(4, 2),
            torch.randn(8, 4),
            example_inputs=torch.randn(2, 4),
            recipe={"preset": "w8a8", "tensorboard": True},
            out=tmp_path / "out",
        )
    assert not list(tmp_path.iterdir())
