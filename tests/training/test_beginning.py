"""--resume goes on only with what the run began with; what differs is named."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import sqakd_fx
from sqakd_fx.errors import TrainingError
from sqakd_fx.recipe.resolution import resolve_recipe
from sqakd_fx.training.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
from sqakd_fx.training.progress import Listener

ROWS = torch.randn(96, 6, generator=torch.Generator().manual_seed(0))
BASE = {
    "steps": 6,
    "checkpoint_steps": 2,
    "checkpoint_seconds": 1e9,
    "held_out": 0,
    "batch_size": 16,
}


class Net(nn.Module):
    def __init__(self, activation: Any = torch.relu, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.activation(self.a(x)))


class Stop(Exception):
    pass


def run(
    folder: Path, *, net: nn.Module | None = None, data: Any = ROWS, stop: int | None = None,
    bits: str = "w4a4", **keys: Any,
) -> tuple[dict[str, Tensor], list[str]]:  # fmt: skip
    """The student's state, and the notes of training; `stop` is a step at which the run dies, otherwise it resumes."""
    notes: list[str] = []

    def report(step: Any) -> None:
        if stop is not None and step.step >= stop:
            raise Stop

    recipe = resolve_recipe(bits, **(BASE | keys))
    program = sqakd_fx.build_program(net or Net(), ROWS[:2], recipe)
    sqakd_fx.calibrate(program, data)
    sqakd_fx.distil(
        program, data, folder=folder, resume=stop is None, listener=Listener(report, notes.append)
    )
    return program.student.state_dict(), notes


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that died at its fourth step."""
    folder = tmp_path_factory.mktemp("begun")
    with pytest.raises(Stop):
        run(folder, stop=4)
    return folder


@pytest.fixture
def stopped(begun: Path, tmp_path: Path) -> Path:
    return shutil.copytree(begun, tmp_path / "run")


def test_the_same_run_goes_on_and_ends_with_the_same_bytes(stopped: Path, tmp_path: Path) -> None:
    state, notes = run(stopped)
    whole, _ = run(tmp_path / "whole")
    assert notes == ["resumed at step 2 of 6"]
    assert all(torch.equal(state[name], whole[name]) for name in whole)


OTHER: dict[str, tuple[dict[str, Any], str]] = {
    "bits": ({"bits": "w8a8"}, "weight_bits was 4 and is 8"),
    "seed": ({"seed": 5}, "seed was 0 and is 5"),
    "batch size": ({"batch_size": 8}, "batch_size was 16 and is 8"),
    "rate": ({"learning_rate": 0.1}, "learning_rate was 0.0003 and is 0.1"),
    "optimizer": ({"optimizer": "sgd"}, "optimizer was adam and is sgd"),
    "fewer steps": ({"steps": 4}, "the run had 6 steps and would have 4"),
    "weights": ({"net": Net(seed=1)}, "the model has other weights"),
    "layer": ({"net": Net(torch.tanh)}, "the model has another graph"),
    "data": ({"data": ROWS + 1}, "the data has another first batch"),
    "less data": ({"data": ROWS[:64]}, "the data had 6 batches an epoch and has 4"),
}


@pytest.mark.parametrize("case", OTHER)
def test_another_run_is_refused_and_says_what_is_other(stopped: Path, case: str) -> None:
    changed, said = OTHER[case]
    with pytest.raises(TrainingError) as refused:
        run(stopped, **changed)
    assert said in str(refused.value)
    assert "start again without --resume" in str(refused.value)
    assert list(stopped.rglob("step-*.safetensors"))


def test_more_steps_and_other_ways_to_compute_go_on_with_a_note(stopped: Path) -> None:
    _, notes = run(stopped, steps=8, tf32=False, checkpoint_steps=3, tensorboard=False)
    assert any("had 6 steps and has 8" in note and "tf32 was True" in note for note in notes)
    assert "resumed at step 2 of 8" in notes


def test_data_that_never_repeats_itself_goes_on_with_a_note(tmp_path: Path) -> None:
    class Changing:
        def __iter__(self) -> Iterator[Tensor]:
            chance = torch.Generator()
            chance.seed()
            return iter(torch.randn(6, 16, 6, generator=chance))

    with pytest.raises(Stop):
        run(tmp_path, data=Changing(), stop=4)
    _, notes = run(tmp_path, data=Changing())
    assert any("other batches each time" in note for note in notes)


def test_a_loader_with_a_generator_of_its_own_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def loader() -> DataLoader[Any]:
        chance = torch.Generator().manual_seed(3)
        data = TensorDataset(ROWS)
        return DataLoader(data, batch_size=24, shuffle=True, generator=chance)

    whole, _ = run(tmp_path / "whole", data=loader(), steps=10)
    with pytest.raises(Stop):
        run(tmp_path / "part", data=loader(), steps=10, stop=8)
    state, notes = run(tmp_path / "part", data=loader(), steps=10)
    assert notes == ["resumed at step 6 of 10"]
    assert all(torch.equal(state[name], whole[name]) for name in whole)


@pytest.mark.parametrize("content", ["[]", "3", '"x"', "null", '{"format": 1}', "{}", "[" * 9999])
def test_what_is_no_record_of_a_checkpoint_is_skipped_for_the_one_before(
    tmp_path: Path, content: str
) -> None:
    save_checkpoint(tmp_path, Checkpoint(1, {}, {}))
    path = save_checkpoint(tmp_path, Checkpoint(2, {}, {}))
    path.with_suffix(".json").write_text(content)
    found, notes = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1
    assert "was skipped" in notes[0]


@pytest.mark.parametrize(
    "state",
    [{}, {"beginning": []}, {"beginning": {"recipe": 3}}, {"beginning": {"recipe": {}}}],
    ids=str,
)
def test_a_checkpoint_without_a_beginning_is_one_sentence(
    tmp_path: Path, state: dict[str, Any]
) -> None:
    save_checkpoint(tmp_path / "checkpoints", Checkpoint(2, {}, state))
    with pytest.raises(TrainingError, match="start again without --resume"):
        run(tmp_path)
