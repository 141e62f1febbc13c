"""What is wrong with data is named, with its place, and streams without an end are taken."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any
from weakref import WeakSet

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import sqakd_fx
from sqakd_fx.cli.main import wait_without_spinning
from sqakd_fx.errors import SourceError
from sqakd_fx.pipeline import Silent
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


def spoilt(index: int, value: float = float("nan")) -> list[Tensor]:
    """Batches of 16 rows with one value in row `index` that is not finite."""
    rows = ROWS.clone()
    rows[index, 2] = value
    return list(rows.split(16))


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    return nn.Sequential(*layers).eval()


LABELS = torch.arange(16) % 3
ELSEWHERE: dict[str, tuple[Any, dict[str, Any], list[Any] | None, str]] = {
    "held out": (
        torch.cat(spoilt(155, float("inf"))),
        {"held_out": 8},
        None,
        "batch 0 of the held-out data holds NaN or infinity, in sample 3",
    ),
    "statistics": (
        spoilt(100),
        {"steps": 1, "reestimate_batch_norm": 10, "batch_norm": "absorb"},
        None,
        "batch 6 of the data holds NaN or infinity, in sample 4",
    ),
    "evaluation": (
        ROWS,
        {},
        [(spoilt(5)[0], LABELS)],
        "batch 0 of the evaluation data holds NaN or infinity, in sample 5",
    ),
    "validation": (
        spoilt(150),
        {"steps": 1},
        None,
        "batch 9 of the data holds NaN or infinity, in sample 6",
    ),
}


@pytest.mark.parametrize("where", ELSEWHERE)
def test_a_value_that_is_not_finite_is_named_wherever_data_is_read(
    where: str, tmp_path: Any
) -> None:
    data, keys, evaluation, said = ELSEWHERE[where]
    with pytest.raises(SourceError, match=said):
        quantized(tmp_path, data, eval_data=evaluation, **keys)


def quantized(folder: Any, data: Any, eval_data: Any = None, **keys: Any) -> Any:
    fixed = {"calibration_batches": 1, "held_out": 0, "batch_size": 16, "steps": 2}
    made = {"recipe": fixed | keys, "out": folder / "out", "observer": Silent()}
    return sqakd_fx.quantize(net(), data, example_inputs=ROWS[:2], eval_data=eval_data, **made)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (LABELS + 1, "batch 0 of the training data has the label 3, .* classes 0 to 2"),
        (-LABELS, "has the label -1"),
        (["cat"] * 16, "the labels of batch 0 of the training data are not numbers"),
    ],
    ids=["too large", "negative", "texts"],
)
def test_labels_that_are_no_classes_are_named(labels: Any, said: str) -> None:
    batches = [(ROWS[:16], labels)]
    with pytest.raises(SourceError, match=said):
        sqakd_fx.distil(calibrated(batches, labels=0.5), batches)


def test_the_label_that_a_loss_leaves_out_is_taken() -> None:
    batches = [(ROWS[:16], torch.where(LABELS == 1, -100, LABELS))]
    done = sqakd_fx.distil(calibrated(batches, labels=0.5, steps=1), batches)
    assert done.loss > 0


def test_a_stream_without_an_end_trains_for_the_steps_that_were_asked_for() -> None:
    drawn = itertools.count()

    def endless() -> Iterator[Tensor]:
        for _ in drawn:
            yield ROWS[:16]

    stream = endless()
    program = calibrated(ROWS)
    sqakd_fx.distil(program, stream)
    assert next(drawn) <= 14


class Endless(IterableDataset[Tensor]):
    """Reads on and on, as a camera does."""

    def __iter__(self) -> Iterator[Tensor]:
        return itertools.repeat(ROWS[0])


@pytest.mark.parametrize("data", [Endless(), DataLoader(Endless(), 16)], ids=["samples", "loader"])
def test_data_without_an_end_is_asked_for_steps(data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sqakd_fx.source.inputs._MOST_COUNTED", 50)
    with pytest.raises(SourceError, match="50 batches and did not end: say with --steps"):
        sqakd_fx.distil(calibrated(data, steps=None, epochs=1), data)


def test_a_stream_that_memory_does_not_keep_trains_and_is_not_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alive: WeakSet[Tensor] = WeakSet()
    most = [0]

    def endless() -> Iterator[Tensor]:
        while True:
            batch = ROWS[:16].clone()
            alive.add(batch)
            most[0] = max(most[0], len(alive))
            yield batch

    monkeypatch.setattr("sqakd_fx.source.replay.memory", lambda: 2 * 8 * ROWS[:16].nbytes)
    program, stream = calibrated(ROWS, steps=60), endless()
    assert sqakd_fx.distil(program, stream).steps == 60
    assert most[0] < 20
    with pytest.raises(SourceError, match="did not end: say with --steps"):
        sqakd_fx.distil(calibrated(ROWS, steps=None, epochs=1), endless())


def test_an_example_that_requires_gradients_is_taken(tmp_path: Any) -> None:
    example = ROWS[:2].clone().requires_grad_()
    recipe = {"steps": 0, "batch_size": 16, "calibration_batches": 1}
    out = {"out": tmp_path / "out", "observer": Silent()}
    made = sqakd_fx.quantize(net(), ROWS, example_inputs=example, recipe=recipe, **out)
    assert made is not None
    assert not made.validation.failures


@pytest.mark.parametrize(
    ("example", "said"),
    [
        (torch.full((2, 6), float("nan")), "the example holds NaN or infinity, in sample 0"),
        (ROWS[:2].to_sparse(), "the example has a sparse_coo tensor"),
        (ROWS[:2].to("meta"), "the example has a meta tensor"),
    ],
    ids=["NaN", "sparse", "without values"],
)
def test_an_example_without_values_is_refused(tmp_path: Any, example: Tensor, said: str) -> None:
    with pytest.raises(SourceError, match=said):
        sqakd_fx.quantize(
            net(), ROWS, example_inputs=example, out=tmp_path / "out", observer=Silent()
        )


class Unmeasured(Dataset[Tensor]):
    """Says a length that is none."""

    def __len__(self) -> int:
        return -1

    def __getitem__(self, index: int) -> Tensor:
        return ROWS[index]


def test_data_that_does_not_say_how_long_it_is_is_refused() -> None:
    with pytest.raises(SourceError, match=r"does not say how long it is .* its __len__ gives"):
        calibrated(Unmeasured(), held_out=8)


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
