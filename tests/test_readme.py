"""The README's example of a new quantizer family runs as it stands."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from sqakd_fx.errors import RecipeError
from sqakd_fx.quant.families import FAMILIES
from sqakd_fx.recipe import resolve_recipe

README = Path(__file__).parent.parent / "README.md"


def family_example() -> str:
    blocks = re.findall(r"^( *)```python\n(.*?)^ *```", README.read_text("utf-8"), re.S | re.M)
    return next(textwrap.dedent(code) for _, code in blocks if "register(" in code)


def test_a_family_is_added_in_thirty_lines_and_goes_through_to_onnx(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = family_example()
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
