"""The stages as a library: what `quantize` does, step by step, on data of any form."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import sqakd_fx
from sqakd_fx.errors import ExportError, TrainingError
from sqakd_fx.training.progress import Listener, StepReport

ROWS = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
QUICK = {"preset": "w4a4", "steps": 6, "compile": "never", "device": "cpu", "held_out": 0}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()


def calibrated(**settings: Any) -> sqakd_fx.Program:
    program = sqakd_fx.build_program(network(), ROWS[:2], QUICK | settings)
    sqakd_fx.calibrate(program, ROWS.split(8))
    return program


def state_after(data: Any, **settings: Any) -> dict[str, Tensor]:
    program = calibrated(**settings)
    assert sqakd_fx.distil(program, data).steps == 6
    return program.student.state_dict()


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(value.equal(other[name]) for name, value in one.items())


@pytest.mark.parametrize(
    "form",
    [
        lambda: list(ROWS.split(8)),
        lambda: iter(ROWS.split(8)),
        lambda: ((batch, torch.zeros(8)) for batch in ROWS.split(8)),
        lambda: DataLoader(TensorDataset(ROWS), batch_size=8),
        lambda: [{"input": batch} for batch in ROWS.split(8)],
    ],
    ids=["list", "iterator", "labelled", "loader", "dicts"],
)
def test_distil_takes_the_same_batches_in_any_form(form: Any) -> None:
    wanted = state_after(ROWS.split(8))
    assert equal(state_after(form()), wanted)
    assert not equal(calibrated().student.state_dict(), wanted)


def test_the_stages_train_and_write_what_quantize_does(tmp_path: Path) -> None:
    result = sqakd_fx.quantize(
        network(), ROWS, example_inputs=ROWS[:2], recipe=QUICK, out=tmp_path / "out"
    )
    assert result is not None
    program = sqakd_fx.build_program(network(), ROWS[:2], QUICK)
    sqakd_fx.calibrate(program, ROWS)
    sqakd_fx.distil(program, ROWS)
    assert equal(program.student.state_dict(), result.student.state_dict())
    lowered = sqakd_fx.lower(program.student).graph_module
    exported = sqakd_fx.export(program, lowered, tmp_path / "model.onnx")
    assert exported.path.read_bytes() == result.model_path.read_bytes()
    checked = sqakd_fx.validate(program, lowered, exported.path, ROWS)
    assert (checked.failures, checked.samples) == ((), 24)


def test_an_interrupted_run_goes_on_from_its_folder(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    class Batches:
        """Ends the process, as it were, at the fourth step of training."""

        drawn = 0

        def __iter__(self) -> Iterator[Tensor]:
            for batch in ROWS.split(8):
                self.drawn += 1
                if self.drawn == 9:  # three to count them, two to know them, three steps
                    raise Killed
                yield batch

    wanted = state_after(ROWS.split(8), checkpoint_steps=1)
    program = calibrated(checkpoint_steps=1)
    with pytest.raises(sqakd_fx.SqakdError, match="Killed"):
        sqakd_fx.distil(program, Batches(), folder=tmp_path)
    kept = sorted(tmp_path.rglob("step-*"))
    with pytest.raises(
        sqakd_fx.SqakdError, match=r"stopped run, trained to step \d+: .*force=True"
    ):
        sqakd_fx.distil(calibrated(checkpoint_steps=1), ROWS.split(8), folder=tmp_path)
    assert kept == sorted(tmp_path.rglob("step-*"))
    program = calibrated(checkpoint_steps=1)
    sqakd_fx.distil(program, ROWS.split(8), folder=tmp_path, resume=True)
    assert equal(program.student.state_dict(), wanted)
    assert not list(tmp_path.rglob("step-*"))


def test_training_is_heard_of_and_leaves_the_users_generators_and_model_alone() -> None:
    reports: list[StepReport] = []
    notes: list[str] = []
    model = network().train()
    torch.manual_seed(7)
    state = torch.get_rng_state()
    program = sqakd_fx.build_program(model, ROWS[:2], QUICK | {"early_stop": 1})
    sqakd_fx.calibrate(program, ROWS.split(8))
    sqakd_fx.distil(program, ROWS.split(8), listener=Listener(reports.append, notes.append))
    assert [report.step for report in reports] == [6]
    assert any("early_stop has no effect" in note for note in notes)
    assert torch.get_rng_state().equal(state)
    assert model.training
    assert not program.student.training


def test_a_student_without_ranges_is_not_trained() -> None:
    program = sqakd_fx.build_program(network(), ROWS[:2], QUICK)
    assert not program.is_calibrated
    with pytest.raises(TrainingError, match=r"call calibrate\(program, data\) first"):
        sqakd_fx.distil(program, ROWS)


def test_an_unknown_profile_is_refused_with_the_ones_there_are(tmp_path: Path) -> None:
    program = calibrated()
    lowered = sqakd_fx.lower(program.student).graph_module
    with pytest.raises(ExportError, match="no profile 'tflite': choose container, packed"):
        sqakd_fx.export(program, lowered, tmp_path / "model.onnx", profile="tflite")


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.layer(x) * scale


SCALE = torch.rand(24, 1) + 0.5


@pytest.mark.parametrize(
    "call",
    [
        lambda part: (ROWS[part], SCALE[part]),
        lambda part: {"scale": SCALE[part], "x": ROWS[part]},
    ],
    ids=["tuple", "dict"],
)
def test_a_model_of_several_inputs_is_called_as_its_example_was_given(call: Any) -> None:
    model = Scaled().eval()
    traced = sqakd_fx.trace(model, call(slice(2)))
    assert len(traced.graph_module.graph.find_nodes(op="placeholder")) == 2
    program = sqakd_fx.build_program(model, call(slice(2)), QUICK)
    sqakd_fx.calibrate(program, [call(slice(8)), call(slice(8, 16))])
    inputs = program.inputs(call(slice(24)))
    assert torch.allclose(program.teacher(*inputs), model(ROWS, SCALE))
    assert torch.allclose(program.student(*inputs), model(ROWS, SCALE), atol=0.5)
