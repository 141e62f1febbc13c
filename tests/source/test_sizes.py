"""Batches of other sizes than the example's are trained on where the model holds for them, or refused at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sqakd_fx
from sqakd_fx.errors import SourceError
from sqakd_fx.program import Program, build_program
from sqakd_fx.results.evaluate import validation_batches
from sqakd_fx.source.inputs import calibration_batches, source_inputs
from sqakd_fx.source.source import Source

EXAMPLE = torch.rand(1, 3, 8, 8)
TALL, SQUARE = torch.rand(4, 3, 12, 8), torch.rand(4, 3, 8, 8)
CPU = torch.device("cpu")


class Convolutional(nn.Module):
    """Takes images of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.b(torch.relu(self.a(x))), size=x.shape[-2:])


class Flat(Convolutional):
    """Takes images of one size."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)).reshape(len(x), 32)


class Scaled(Convolutional):
    """Takes images of any size; a graph has the number that the example's height gives."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) * x.size(2)


def source_of(
    model: nn.Module, data: list[Tensor], evaluated: list[Tensor] | None = None
) -> Source:
    labelled = None if evaluated is None else [(x, torch.zeros(len(x))) for x in evaluated]
    return Source("model.py", "model", model.eval(), (EXAMPLE,), {}, data, labelled, None)


def calibrated(model: nn.Module, data: list[Tensor]) -> tuple[Source, Program, str | None]:
    source = source_of(model, data)
    program = build_program(source.model, EXAMPLE, "w8a8")
    inputs = source_inputs(source, program)
    assert len(list(calibration_batches(inputs, CPU))) == len(data)
    return source, program, inputs.sizes.sentence()


def test_other_sizes_are_taken_and_said() -> None:
    _, _, sentence = calibrated(Convolutional(), [TALL, SQUARE, TALL, TALL.mT])
    assert sentence is not None
    assert "'x' of 3×12×8, 3×8×12 beside the example's 3×8×8: all are trained on" in sentence
    assert "the exported file takes 3×8×8 only" in sentence


def test_nothing_is_said_of_the_examples_size() -> None:
    assert calibrated(Flat(), [SQUARE, SQUARE[:2]])[2] is None


@pytest.mark.parametrize("make", [Flat, Scaled])
def test_a_size_at_which_the_graph_is_not_the_model_is_refused(make: type[nn.Module]) -> None:
    with pytest.raises(
        SourceError, match=r"'x' of 3×12×8.*the example's 3×8×8 only.*resize or pad"
    ):
        calibrated(make(), [SQUARE, TALL])


def test_data_without_the_examples_size_is_refused() -> None:
    with pytest.raises(SourceError, match=r"3×12×8, never of the example's 3×8×8.*example_inputs"):
        calibrated(Convolutional(), [TALL, TALL])


def test_a_file_is_validated_on_the_batches_that_it_takes() -> None:
    source, program, _ = calibrated(Convolutional(), [TALL, SQUARE])
    inputs = source_inputs(source, program)
    batches = [batch for batch, _ in validation_batches(source, program, inputs)]
    assert [x.shape for (x,) in batches] == [SQUARE.shape]


def test_evaluation_data_of_another_size_is_refused() -> None:
    source = source_of(Convolutional(), [SQUARE], [TALL])
    program = build_program(source.model, EXAMPLE, "w8a8")
    with pytest.raises(SourceError, match=r"evaluation data gives 'x' of 3×12×8.*takes 3×8×8 only"):
        list(validation_batches(source, program, None))


def test_evaluation_data_is_looked_at_before_training(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="evaluation data gives 'x' of 3×12×8"):
        sqakd_fx.quantize(
            Convolutional(),
            [SQUARE],
            example_inputs=EXAMPLE,
            recipe="w8a8",
            out=tmp_path / "out",
            eval_data=[(TALL, torch.zeros(4))],
        )
    assert not list((tmp_path / "out").rglob("train.jsonl"))
