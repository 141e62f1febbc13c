"""report.html is one offline page; nothing of a result folder is trusted."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from sqakd_fx.cli.main import app
from sqakd_fx.errors import StorageError
from sqakd_fx.report.held import read_held
from sqakd_fx.report.page import page
from sqakd_fx.results.figures import figures

pytest.importorskip("plotly", reason="the HTML report needs plotly")

HOSTILE = (
    "</script><script>alert(1)</script><img src=http://a/b onerror=alert(2)>"
    "<a href='javascript:alert(3)'>x</a>\x1b[31m"
)
FOREIGN_IMAGE = r'<img(?! src="data:image/png;base64,[A-Za-z0-9+/=]+" (?:width|height|alt)=)'
"""Any image but one that is written into the page."""
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def drawn(folder: Path, plotly: str = "/* Plotly */") -> str:
    return page(read_held(folder), plotly)


def charts(text: str) -> list[dict[str, Any]]:
    found = re.search(r'<script type="application/json" id="charts">(.*?)</script>', text)
    assert found is not None
    made: list[dict[str, Any]] = json.loads(found[1])
    return made


def copy_of(result: Path, folder: Path) -> Path:
    return Path(shutil.copytree(result, folder / "copy"))


def renamed(value: Any) -> Any:
    """The same JSON with every text in it hostile, but for the texts that are compared with."""
    if isinstance(value, dict):
        return {key: renamed(one) for key, one in value.items()}
    if isinstance(value, list):
        return [renamed(one) for one in value]
    return HOSTILE if isinstance(value, str) else value


def hostile(result: Path, folder: Path) -> Path:
    made = copy_of(result, folder)
    for path in (made / "report.json", made / "tensors.json"):
        path.write_text(json.dumps(renamed(json.loads(path.read_text()))))
    (made / "recipe.toml").write_text(f"name = '''{HOSTILE}'''")
    return made


def test_the_command_writes_it_without_the_model_from_another_directory(
    result: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = copy_of(result, tmp_path)
    for name in ("student.safetensors", "graph.json", "program.json", "example.safetensors"):
        (moved / name).unlink()
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["report", "copy"])
    assert done.exit_code == 0, done.output
    assert "wrote copy/report.html" in done.output
    assert (moved / "report.html").stat().st_size > 1_000_000


def test_the_page_loads_nothing_and_runs_only_its_own_scripts(result: Path) -> None:
    text = drawn(result)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    assert policy[1].startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-inline" not in policy[1].partition("script-src")[2].partition(";")[0]
    scripts = re.findall(r"<script>(.*?)</script>", text, re.S)
    assert len(scripts) == 2
    for script in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy[1]
    assert not re.search(rf"https?://|<link|<iframe|{FOREIGN_IMAGE}|@import|url\(", text)


def test_the_numbers_are_those_of_the_report(result: Path) -> None:
    text, report = unescape(drawn(result)), json.loads((result / "report.json").read_text())
    words = dict(figures(report, result / "model.onnx"))
    assert f"{report['accuracy']['onnx']:.2f} %" in text
    assert words["accuracy"] in text
    assert words["size"].partition(", ")[2] in text
    assert f"{report['integer_ms']:.3g} ms" in text
    assert str(report["seed"]) in text
    assert report["data"]["training"] in text
    for layer in report["layers"]:
        assert layer["name"] in text
    (sizes,) = [one for one in charts(text) if one["name"] == "sizes"]
    assert report["onnx_bytes"] / 1024 in sizes["choices"][0]["data"][0]["x"]
    for sample in report["farthest_samples"]:
        assert f">{sample['index']}</td>" in text


def test_samples_that_are_images_are_shown_as_such(result: Path) -> None:
    text, report = drawn(result), json.loads((result / "report.json").read_text())
    found = re.findall(r'<img src="data:image/png;base64,([^"]+)"', text)
    assert len(found) == len(report["farthest_samples"])
    first = report["farthest_samples"][0]["shown"]
    with Image.open(io.BytesIO(base64.b64decode(found[0]))) as image:
        assert image.size == (first["width"], first["height"]) == (8, 8)
        assert image.tobytes() == base64.b64decode(first["pixels"])


@pytest.mark.parametrize(
    "changed",
    [{"pixels": "AAAA"}, {"pixels": "<b>"}, {"height": 9**9}, {"channels": 2}, {"width": -8}],
)
def test_pixels_that_are_no_image_of_their_size_are_left_out(
    result: Path, tmp_path: Path, changed: dict[str, Any]
) -> None:
    folder = copy_of(result, tmp_path)
    report = json.loads((folder / "report.json").read_text())
    for sample in report["farthest_samples"]:
        sample["shown"] |= changed
    (folder / "report.json").write_text(json.dumps(report))
    assert "<img" not in drawn(folder)


def test_samples_that_are_no_images_are_shown_as_numbers(result: Path, tmp_path: Path) -> None:
    folder = copy_of(result, tmp_path)
    report = json.loads((folder / "report.json").read_text())
    numbers = {"shape": [2, 3], "lowest": -1.0, "mean": 0.25, "highest": 4.0, "values": [0.5, -1]}
    for sample in report["farthest_samples"]:
        sample["shown"] = numbers
    (folder / "report.json").write_text(json.dumps(report))
    text = drawn(folder)
    assert "<img" not in text
    assert "2×3; -1 to 4, mean 0.25; 0.5, -1" in text


def test_agreement_is_drawn_up_to_all_samples(result: Path) -> None:
    (drawn_chart,) = [one for one in charts(drawn(result)) if one["name"] == "agreement"]
    choice = drawn_chart["choices"][0]
    low, high = choice["layout"]["yaxis"]["range"]
    assert low < min(y for line in choice["data"] for y in line["y"]) <= 1 < high < 1.06
    assert low < 0.99


def test_what_a_folder_lacks_is_left_out(result: Path, tmp_path: Path) -> None:
    bare = copy_of(result, tmp_path)
    for name in ("tensors.json", "train.jsonl", "model.onnx", "recipe.toml"):
        (bare / name).unlink()
    report = json.loads((bare / "report.json").read_text())
    for key in ("command", "system", "data", "steps", "farthest_samples", "sensitive_tensors"):
        del report[key]
    (bare / "report.json").write_text(json.dumps(report))
    text = drawn(bare)
    assert {one["name"] for one in charts(text)} <= {"sizes", "layers", "agreement"}
    assert "<h2>Activations" not in text
    assert "The folder holds no model.onnx" in text


def test_a_sensitivity_file_is_one_more_column(result: Path, tmp_path: Path) -> None:
    folder = copy_of(result, tmp_path)
    layers = json.loads((folder / "report.json").read_text())["layers"]
    rows = [
        {"name": one["name"], "parameters": 1, "macs": 1, "weight_bits": 4, "source": "recipe w4a4",
         "divergence": {"4": 0.25}, "chosen_bits": None}
        for one in layers
    ]  # fmt: skip
    (folder / "sensitivity.json").write_text(json.dumps(rows))
    (chart,) = [one for one in charts(drawn(folder)) if one["name"] == "layers"]
    assert any(one["data"][0]["x"] == [0.25] * len(layers) for one in chart["choices"])
    assert "KL where it alone is quantized" in drawn(folder)


def test_a_product_without_a_weight_has_no_figures_of_its_neighbour(
    result: Path, tmp_path: Path
) -> None:
    folder = copy_of(result, tmp_path)
    report = json.loads((folder / "report.json").read_text())
    tensors = json.loads((folder / "tensors.json").read_text())
    linear = next(one for one in report["layers"] if one["operation"] == "linear")
    product = linear | {
        "name": "block",
        "operation": "matmul",
        "weight_bits": None,
        "parameters": 0,
    }
    report["layers"] = [product, linear | {"name": "block.qkv"}]
    weight = next(one for one in tensors if one["role"] == "weight")
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "tensors.json").write_text(
        json.dumps([weight | {"quantizer": "block.qkv.weight_quantizer", "grid_noise": 33.0}])
    )
    (chart,) = [one for one in charts(drawn(folder)) if one["name"] == "layers"]
    known = [choice["data"][0]["x"] for choice in chart["choices"]]
    assert [None, 33.0] in known
    assert all(values[0] is None or values == [8, 8] for values in known)


def test_no_name_becomes_markup(result: Path, tmp_path: Path) -> None:
    text = drawn(hostile(result, tmp_path))
    assert "alert(1)" in text, "the names are shown"
    assert not re.search(rf"<a\b|{FOREIGN_IMAGE}", text)
    assert len(re.findall(r"<script", text)) == 3
    assert "\x1b" not in text
    for one in charts(text):
        assert "<a" not in json.dumps(one), "Plotly makes links of these"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("report.json", '{"name": 1}'),
        ("report.json", "[]"),
        ("report.json", "{"),
        ("train.jsonl", "{"),
        ("train.jsonl", '{"step": "<b>"}'),
        ("tensors.json", '[{"quantizer": 1}]'),
        ("tensors.json", "{}"),
        ("sensitivity.json", "[[]]"),
    ],
)
def test_a_damaged_file_is_named(result: Path, tmp_path: Path, file: str, content: str) -> None:
    folder = copy_of(result, tmp_path)
    (folder / file).write_text(content)
    with pytest.raises(StorageError, match=f"{file} is damaged") as raised:
        read_held(folder)
    assert "\n" not in str(raised.value)


def test_numbers_that_are_not_finite_are_gaps(result: Path, tmp_path: Path) -> None:
    folder = copy_of(result, tmp_path)
    step = json.loads((folder / "train.jsonl").read_text().splitlines()[0])
    lines = [json.dumps(step | {"step": 1, "loss": float("nan")}), json.dumps(step)]
    (folder / "train.jsonl").write_text("\n".join(lines))
    tensors = json.loads((folder / "tensors.json").read_text())
    far = [one | {"start": float("-inf"), "lowest": float("nan")} for one in tensors]
    (folder / "tensors.json").write_text(json.dumps(far))
    (loss,) = [one for one in charts(drawn(folder)) if one["name"] == "loss"]
    assert loss["choices"][0]["data"][0]["y"] == [None, step["loss"]]


def test_a_file_that_is_no_model_costs_the_graph_alone(result: Path, tmp_path: Path) -> None:
    folder = copy_of(result, tmp_path)
    (folder / "model.onnx").write_bytes(b"no model")
    text = drawn(folder)
    assert "runtime was not asked" in text or "cannot be read" in text
    assert "<h2>Layers" in text


def test_another_folder_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert done.exit_code == 2
    assert "is not a result folder" in done.output


def test_without_plotly_the_error_names_the_command(
    result: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "plotly.offline", None)
    done = CliRunner().invoke(app, ["report", str(result)])
    assert done.exit_code == 2
    assert "pip install 'sqakd-fx[report]'" in done.output


def test_plotly_knows_every_property_of_the_charts(result: Path) -> None:
    import plotly.graph_objects as go

    for one in charts(drawn(result)):
        for choice in one["choices"]:
            go.Figure(choice["data"], choice["layout"])


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_browser_draws_every_chart_and_hostile_names_do_nothing(
    result: Path, tmp_path: Path
) -> None:
    assert CHROMIUM is not None
    folder = hostile(result, tmp_path)
    assert CliRunner().invoke(app, ["report", str(folder)]).exit_code == 0
    sandbox = ["--no-sandbox"] if os.name == "posix" and os.getuid() == 0 else []
    done = subprocess.run(
        [CHROMIUM, "--headless", *sandbox, "--disable-gpu", "--virtual-time-budget=8000",
         f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--dump-dom",
         (folder / "report.html").as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    wanted = len(charts((folder / "report.html").read_text()))
    assert f'data-drawn="{wanted}"' in done.stdout
    assert "CONSOLE" not in done.stderr, done.stderr
    shown = re.sub(r"<script.*?</script>", "", done.stdout, flags=re.S)
    assert not re.search(rf"{FOREIGN_IMAGE}|<a [^>]*(http|javascript)", shown)
