"""The file beside the float model, by figures that numpy gives too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

import sqakd_fx

ROWS = torch.randn(120, 12, generator=torch.Generator().manual_seed(0))


class Heads(nn.Module):
    """Class scores, and values that a user calls boxes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.box = nn.Linear(12, 16), nn.Linear(16, 5), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = torch.relu(self.body(x))
        return {"logits": self.head(y), "boxes": self.box(y)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Any]:
    model = Heads().eval()
    settings = {"preset": "w4a4", "steps": 0, "batch_size": 40}
    out = tmp_path_factory.mktemp("run") / "out"
    result = sqakd_fx.quantize(model, ROWS, example_inputs=ROWS[:2], recipe=settings, out=out)
    return model, result


def test_every_output_is_judged_against_the_float_model(finished: tuple[nn.Module, Any]) -> None:
    model, result = finished
    running = ort.InferenceSession(str(result.model_path), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        wanted = [x.numpy().astype(np.float64) for x in model(ROWS).values()]
    logits, boxes = result.report["outputs"]
    assert (logits["name"], boxes["name"]) == ("logits", "boxes")
    seen = logits["samples"]
    assert 80 <= seen <= len(ROWS)
    got = running.run(None, {running.get_inputs()[0].name: ROWS.numpy()})
    same = (got[0].argmax(1) == wanted[0].argmax(1)).mean()
    error = np.linalg.norm(got[1] - wanted[1]) / np.linalg.norm(wanted[1])
    assert logits["agreement"] == pytest.approx(same, abs=0.05)
    assert boxes["agreement"] is None
    assert boxes["relative_error"] == pytest.approx(error, rel=0.1)
    assert boxes["noise_ratio"] == pytest.approx(-20 * np.log10(boxes["relative_error"]))
    assert 0.9 < boxes["cosine"] < 1


def test_the_summary_leads_with_the_float_model(
    finished: tuple[nn.Module, Any], tmp_path: Path
) -> None:
    _, result = finished
    first, second = (row[0] for row in result.report["summary"][:2])
    assert first.startswith("logits, beside float, ")
    assert second.startswith("boxes, beside float, ")
    shown = (result.out / "report.md").read_text(encoding="utf-8")
    assert "trained graph" not in shown.split("## Checks")[0]
