"""The examples of Python in README, CONTRIBUTING and docs run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import sqakd_fx
from sqakd_fx.errors import RecipeError
from sqakd_fx.quant.families import FAMILIES
from sqakd_fx.recipe.resolution import resolve_recipe

ROOT = Path(__file__).parent.parent
LIBRARY, FAMILY, README = ROOT / "docs" / "library.md", ROOT / "CONTRIBUTING.md", ROOT / "README.md"


def example_with(text: str, page: Path) -> str:
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.S | re.M)
    return next(code for code in blocks if text in code)


def test_a_loop_of_ones_own_trains_a_student_that_is_exported_as_it_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = example_with("optimizer.step()", LIBRARY)
    torch.manual_seed(0)
    images = torch.randn(32, 1, 8, 8)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    )
    before = {name: value.clone() for name, value in net.eval().state_dict().items()}
    names = {"net": net, "images": images, "batches": images.split(8)}
    exec(compile(code, str(LIBRARY), "exec"), names)
    untrained = sqakd_fx.build_program(net, images[:2], "w4a4")
    sqakd_fx.calibrate(untrained, names["batches"])
    trained = dict(names["student"].named_parameters())
    learned = {name: x for name, x in untrained.student.named_parameters() if x.requires_grad}
    assert {"4.weight", "4.weight_quantizer.step", "2.output_quantizer.step"} <= learned.keys()
    assert not [name for name, x in learned.items() if x.equal(trained[name])]
    assert names["checked"].failures == ()
    assert names["checked"].samples == 32
    assert Path("out/net.onnx").stat().st_size > 0
    assert "call_module[target=4]" in capsys.readouterr().out
    assert all(value.equal(before[name]) for name, value in net.state_dict().items())


def test_a_family_is_added_in_thirty_lines_and_goes_through_to_onnx(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = example_with("register(", FAMILY)
    assert len(code.splitlines()) <= 30
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    names = {"net": net, "images": torch.randn(64, 1, 8, 8)}
    try:
        exec(compile(code, str(FAMILY), "exec"), names)
        learned = FAMILIES["tqt"].weight.learned
    finally:
        FAMILIES.pop("tqt", None)
    result = names["result"]
    assert learned == ("log2_t",)
    assert next(tmp_path.rglob("model.onnx")).stat().st_size > 0
    assert "tqt" in next(tmp_path.rglob("recipe.toml")).read_text()
    assert result is not None


def test_a_family_that_nobody_registered_is_refused_with_the_ones_there_are() -> None:
    with pytest.raises(RecipeError, match=r"weight_family = 'tqt'.*choose one of minmax.*qil"):
        resolve_recipe("w4a4", weight_family="tqt")


def test_five_lines_run_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 26 * 26, 10))
    images = torch.randn(8, 1, 28, 28)
    program = sqakd_fx.build_program(net.eval(), images, "w4a4")
    sqakd_fx.calibrate(program, [images])
    lowered = sqakd_fx.lower(program.student).graph_module
    folder = Path("sqakd-out/fashion-w8a8")
    folder.mkdir(parents=True)
    sqakd_fx.export(program, lowered, folder / "model.onnx")
    exec(compile(example_with("InferenceSession", README), str(README), "exec"), {})
    assert re.fullmatch(r"\[(\d ?){4}\]\n", capsys.readouterr().out)
