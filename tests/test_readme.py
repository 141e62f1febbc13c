"""The README's examples of Python run as they stand."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

import sqakd_fx
from sqakd_fx.errors import RecipeError
from sqakd_fx.quant.families import FAMILIES
from sqakd_fx.recipe import resolve_recipe

README = Path(__file__).parent.parent / "README.md"


def example_with(text: str) -> str:
    blocks = re.findall(r"^( *)```python\n(.*?)^ *```", README.read_text("utf-8"), re.S | re.M)
    return next(textwrap.dedent(code) for _, code in blocks if text in code)


def test_a_loop_of_ones_own_trains_a_student_that_is_exported_as_it_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = example_with("optimizer.step()")
    torch.manual_seed(0)
    images = torch.randn(32, 1, 8, 8)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    )
    before = {name: value.clone() for name, value in net.eval().state_dict().items()}
    names = {"net": net, "images": images, "batches": images.split(8)}
    exec(compile(code, str(README), "exec"), names)
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
    code = example_with("register(")
    assert len(code.splitlines()) <= 30
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    names = {"net": net, "images": torch.randn(64, 1, 8, 8)}
    try:
        exec(compile(code, str(README), "exec"), names)
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
