"""Names of modules, inputs and outputs are names: whatever the user calls them, the file is the trained function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from sqakd_fx.exporters.profiles import write_profile
from sqakd_fx.program import build_program, lower
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.recipe.resolution import resolve_recipe
from sqakd_fx.results.export import export_job
from sqakd_fx.validation.validate import validate

IMAGES = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
NAMES = {
    "read as a protocol": (
        "conv_quantized", "x_scale", "x_zero_point", "x_quantized", "weight_scale", "val_1", "constant", "bits_4",
    ),
    "of other tensors": ("output", "x", "t5", "c1", "one", "infinity", "head_quantized", "conv2d"),
    "of code": ("class", "graph", "half", "forward", "meta", "training_", 'a"b', "a'b", "a\\"),
    "of odd characters": ("a\nb", "a b/c:0", "a.b", "", "é", "ﬁ", "層", "x" * 300),
}  # fmt: skip
"""Names of modules. `training` is not among them: nn.Module.eval itself fails on a module with such a child."""

PROFILES = {
    "read as a protocol": ("container", "packed", "typed", "qonnx"),
    "of other tensors": ("container", "typed"),
    "of code": ("container", "pt2"),
    "of odd characters": ("packed", "pt2"),
}
"""The profiles in which names of a kind are tried."""


class Named(nn.Module):
    """A layer of each name, a ReLU of nearly its name and, in a module inside, another ReLU of its name."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.inner, self.conv, self.head = nn.Module(), nn.Conv2d(3, 3, 3), nn.Linear(3, 3)
        self.keys = names
        for name in names:  # past what add_module and setattr refuse
            self._modules[name] = nn.Linear(3, 3)
            self._modules[f"{name}_quantized"] = nn.ReLU()
            self.inner._modules[name] = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).mean((2, 3))
        for name in self.keys:
            x = self._modules[f"{name}_quantized"](self._modules[name](x))  # type: ignore[misc]
            x = self.inner._modules[name](x)  # type: ignore[misc]
        return self.head(x)  # type: ignore[no-any-return]


class NamedEnds(nn.Module):
    """Inputs in a dict, and outputs in another."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, rows: dict[str, Tensor], output: Tensor, **more: Tensor) -> dict[str, Tensor]:
        a, b = rows.values()
        (c,) = more.values()
        y = torch.relu(self.left(a + c)) + self.right(b)
        return {'"quoted"\n': y, "output_0": torch.relu(self.right(output)), "x_quantized": y * 2}


def _trained(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The program and its integer form after a few steps."""
    recipe = resolve_recipe("w4a4")
    program = build_program(model.eval(), args, recipe, example_kwargs=kwargs)
    calibrate(program.student, [program.example], method="minmax")
    student = program.student.train()
    optimizer = torch.optim.SGD(student.parameters(), 0.01)
    for _ in range(3):
        given = [student(*program.example), program.teacher(*program.example)]
        ours, wanted = (torch.utils._pytree.tree_leaves(one) for one in given)
        loss = sum(nn.functional.mse_loss(a, b) for a, b in zip(ours, wanted, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    lowered = lower(student.eval()).graph_module
    return program, export_job(lowered, program)


def _check(program: Any, job: Any, profiles: tuple[str, ...], folder: Path) -> None:
    for profile in profiles:
        path = write_profile(profile, job, folder / f"model.{profile}").path
        if profile in ("container", "packed", "typed"):
            checked = validate(program.student, job.lowered, path, [program.example])
            assert checked.failures == ()
            assert checked.trained
        if profile != "pt2":
            graph = onnx.load(path).graph
            made = [name for node in graph.node for name in node.output if name]
            names = [v.name for v in (*graph.input, *graph.initializer)] + made
            assert len(names) == len(set(names))


@pytest.mark.parametrize("kind", NAMES)
def test_a_module_may_have_any_name(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    program, job = _trained(Named(NAMES[kind]), (IMAGES,), {})
    _check(program, job, PROFILES[kind], tmp_path)


def test_inputs_and_outputs_may_have_any_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    rows = {'a"b\n': x, "left_quantized": x * 2}
    program, job = _trained(NamedEnds(), (rows, x - 1), {"class": x + 1})
    assert program.input_names == ("rows_a_b_", "rows_left_quantized", "output", "class_")
    _check(program, job, ("container", "float", "pt2"), tmp_path)


def test_inputs_whose_paths_read_alike_are_told_apart(tmp_path: Path) -> None:
    class Alike(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 4)

        def forward(self, x: dict[str, Tensor], x_a: Tensor) -> Tensor:
            return self.fc(x["a"] - x_a)  # type: ignore[no-any-return]

    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    program, job = _trained(Alike(), ({"a": x}, 2 * x), {})
    assert program.input_names == ("x_a", "x_a_1")
    _check(program, job, ("container",), tmp_path)
