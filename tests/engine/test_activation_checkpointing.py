"""A student in segments: the same training, with less kept for the backward pass."""

from __future__ import annotations

import pytest
import torch
from conftest import distilled
from torch import Tensor, nn

from sqakd_fx.engine.activation_checkpointing import checkpointed
from sqakd_fx.program import Program, build_program
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.recipe.keys import Recipe
from sqakd_fx.recipe.resolution import resolve_recipe
from sqakd_fx.training.progress import StepReport


def calibrated(net: nn.Module, images: Tensor, recipe: Recipe) -> Program:
    program = build_program(net, images[:2], recipe)
    calibrate(program.student, [(images,)])
    return program


def trained(
    net: nn.Module, images: Tensor, *settings: str
) -> tuple[list[float], dict[str, Tensor], tuple[str, ...]]:
    recipe = resolve_recipe(
        "w4a4", settings=["steps=4", "checkpoint_steps=1", "batch_norm=absorb", *settings]
    )
    program = calibrated(net, images, recipe)
    reports: list[StepReport] = []
    done = distilled(program, images, recipe, on_report=reports.append)
    return [report.loss for report in reports], program.student.state_dict(), done.notes


@pytest.mark.parametrize("more", [(), ("feature_weight=0.3", "features=sums")])
def test_a_run_in_segments_is_the_run_bit_for_bit(
    residual_net: nn.Module, images: Tensor, more: tuple[str, ...]
) -> None:
    losses, state, _ = trained(residual_net, images, *more)
    again, segmented, _ = trained(residual_net, images, "checkpoint_activations=true", *more)
    assert again == losses
    assert list(segmented) == list(state)
    assert all(torch.equal(state[name], segmented[name]) for name in state)


class InPlace(nn.Module):
    """Activations that overwrite their input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3)
        self.hardswish, self.silu = nn.Hardswish(inplace=True), nn.SiLU(inplace=True)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.silu(self.norm(self.conv1(x)))
        x = self.hardswish(self.conv2(x))
        x = nn.functional.hardswish(self.silu(x + 1), inplace=True)
        return self.fc(x.mean((2, 3)))


def test_activations_in_place_train_in_segments_as_well(images: Tensor) -> None:
    torch.manual_seed(0)
    net = InPlace().eval()
    losses, state, _ = trained(net, images)
    again, segmented, _ = trained(net, images, "checkpoint_activations=true")
    assert again == losses
    assert all(torch.equal(state[name], segmented[name]) for name in state)


def test_a_run_in_segments_says_that_it_is_not_compiled(
    residual_net: nn.Module, images: Tensor
) -> None:
    _, _, notes = trained(
        residual_net, images, "checkpoint_activations=true", "compile=always", "steps=1"
    )
    assert any("uncompiled" in note for note in notes)


class Live:
    """Counts the bytes of tensors that a backward pass keeps, and the most there were at a time."""

    def __init__(self, own: nn.Module) -> None:
        self.own = {t.untyped_storage().data_ptr() for t in own.state_dict().values()}
        self.now: dict[int, int] = {}
        self.most = 0

    def pack(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.now[storage.data_ptr()] = storage.nbytes()
            self.most = max(self.most, sum(self.now.values()))
        return x


def kept(module: nn.Module, own: nn.Module, images: Tensor) -> int:
    """Bytes kept between the forward and the backward pass."""
    live = Live(own)
    with torch.autograd.graph.saved_tensors_hooks(live.pack, lambda x: x):
        output = module(images)
    output.sum().backward()
    return live.most


def test_segments_keep_less_between_the_passes(residual_net: nn.Module, images: Tensor) -> None:
    recipe = resolve_recipe("w4a4", batch_norm="absorb")
    student = calibrated(residual_net, images, recipe).student.train()
    whole = kept(student, student, images)
    assert kept(checkpointed(student), student, images) < 0.6 * whole
