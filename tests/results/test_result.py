"""A finished run as a value: what it shows, and what it computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import sqakd_fx
from sqakd_fx.errors import SourceError

QUICK = {"steps": 2, "batch_size": 16, "weight_bits": 8, "activation_bits": 8}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[sqakd_fx.Result, nn.Module]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    images = torch.randn(64, 1, 8, 8)
    out = tmp_path_factory.mktemp("a<b>") / "net"
    result = sqakd_fx.quantize(
        net, images, example_inputs=images[:2], recipe=QUICK | {"learning_rate": 1e-5}, out=out
    )
    assert result is not None
    return result, net


def test_its_representation_is_a_few_lines(told: tuple[sqakd_fx.Result, nn.Module]) -> None:
    lines = repr(told[0]).splitlines()
    assert len(lines) <= 6
    assert lines[0] == "Result of net: custom"
    assert [line.split()[0] for line in lines[1:]] == ["file", "size", "accuracy", "speed"]


def test_a_notebook_shows_a_table_with_names_escaped(
    told: tuple[sqakd_fx.Result, nn.Module],
) -> None:
    shown = told[0]._repr_html_()
    assert shown.startswith("<table>")
    assert "a&lt;b&gt;" in shown
    assert "<b>" not in shown
    assert "<p>The file " in shown


def test_it_computes_what_its_file_computes(told: tuple[sqakd_fx.Result, nn.Module]) -> None:
    result, net = told
    images = torch.randn(5, 1, 8, 8, dtype=torch.float64)
    found = result.predict(images)
    assert isinstance(found, torch.Tensor)
    running = result.session()
    (name,) = (one.name for one in running.get_inputs())
    (wanted,) = running.run(None, {name: images.float().numpy()})
    assert np.array_equal(found.numpy(), wanted)
    assert torch.equal(result.predict(**{name: images.numpy()}), found)
    assert torch.nn.functional.cosine_similarity(found, net(images.float())).min() > 0.9


def test_inputs_that_the_file_has_not_are_refused(
    told: tuple[sqakd_fx.Result, nn.Module],
) -> None:
    x = torch.zeros(1, 1, 8, 8)
    for call in (
        lambda: told[0].predict(),
        lambda: told[0].predict(x, x),
        lambda: told[0].predict(y=x),
    ):
        with pytest.raises(SourceError, match="give each of them once"):
            call()


def test_a_run_is_silent_where_no_progress_is_wanted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = torch.randn(64, 4)
    net = nn.Linear(4, 3).eval()
    for progress in (False, True):
        sqakd_fx.quantize(
            net,
            images,
            example_inputs=images[:2],
            recipe={"steps": 0, "weight_bits": 8, "activation_bits": 8},
            out=tmp_path / "net",
            progress=progress,
        )
        assert ("calibrate" in capsys.readouterr().err) == progress
