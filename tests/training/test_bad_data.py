"""What is wrong with data is named, with its place, and streams without an end are taken."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sqakd_fx
from sqakd_fx.cli.main import wait_without_spinning
from sqakd_fx.errors import SourceError
from sqakd_fx.program import Program
from sqakd_fx.training.progress import Listener

ROWS = torch.randn(160, 6, generator=torch.Generator().manual_seed(0))


def calibrated(data: Any, **keys: Any) -> Program:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    fixed = {"calibration_batches": 1, "held_out": 0, "batch_size": 16, "steps": 10}
    recipe = sqakd_fx.resolve_recipe("w4a4", **(fixed | keys))
    program = sqakd_fx.build_program(net, ROWS[:2], recipe)
    sqakd_fx.calibrate(program, data)
    return program


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_named_by_batch_and_sample(value: float) -> None:
    batches = [batch.clone() for batch in ROWS.split(16)]
    batches[7][3, 2] = value
    with pytest.raises(
        SourceError, match="batch 7 of epoch 0 of the data holds NaN or infinity, in sample 3"
    ):
        sqakd_fx.distil(calibrated(batches), batches)


def test_a_stream_without_an_end_trains_for_the_steps_that_were_asked_for() -> None:
    drawn = itertools.count()

    def endless() -> Iterator[Tensor]:
        for _ in drawn:
            yield ROWS[:16]

    stream = endless()
    program = calibrated(ROWS)
    sqakd_fx.distil(program, stream)
    assert next(drawn) <= 14


def test_data_that_requires_gradients_is_taken() -> None:
    rows = ROWS.clone().requires_grad_()
    program = calibrated(rows)
    sqakd_fx.distil(program, rows)
    lowered = sqakd_fx.lower(program.student).graph_module
    with torch.no_grad():
        assert lowered(ROWS[:2]).shape == (2, 3)


def test_mixing_leaves_the_teachers_outputs_uncached_and_says_so(tmp_path: Any) -> None:
    notes: list[str] = []
    program = calibrated(ROWS, mixing="mixup", cache_teacher=True)
    sqakd_fx.distil(program, ROWS, folder=tmp_path, listener=Listener(on_note=notes.append))
    assert any("cache_teacher has no effect: mixing" in note for note in notes)


def test_threads_wait_as_the_user_says_and_else_without_spinning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    wait_without_spinning()
    assert "OMP_WAIT_POLICY" not in os.environ
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    wait_without_spinning()
    assert os.environ["OMP_WAIT_POLICY"] == "active"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    wait_without_spinning()
    assert os.environ["OMP_WAIT_POLICY"] == "passive"
    monkeypatch.delenv("OMP_WAIT_POLICY")
