"""Results beside each other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sqakd_fx.cli.main import app
from sqakd_fx.report.comparison import cautions, rows
from sqakd_fx.report.held import read_held


def changed(result: Path, folder: Path, **keys: Any) -> Path:
    made = Path(shutil.copytree(result, folder))
    report = json.loads((made / "report.json").read_text())
    (made / "report.json").write_text(json.dumps(report | keys))
    return made


def test_a_column_for_each_result_within_eighty_columns(
    result: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    names = ["net-w8a8", "net-w4a8-packed", "net-w4a4", "net-w2a2-of-a-long-name", "a\x1b[31mb"]
    folders = [str(changed(result, tmp_path / name, bits=name[4:8])) for name in names]
    done = CliRunner().invoke(app, ["compare", *folders])
    assert done.exit_code == 0, done.output
    assert max(map(len, done.output.splitlines())) <= 80
    assert "\x1b[31m" not in done.output
    labels = [line.split("  ")[0] for line in done.output.splitlines()]
    for label in ("score", "like float", "size", "time", "bits", "steps", "data", "machine"):
        assert label in labels


def test_the_texts_are_those_of_the_reports(result: Path, tmp_path: Path) -> None:
    other = changed(result, tmp_path / "b", onnx_bytes=2048, float_onnx_bytes=8192, steps=7)
    found = dict(rows([read_held(result), read_held(other)]))
    assert found["size"][1] == "2 KiB"
    assert found["of float"][1] == "0.25"
    assert found["steps"] == ["2", "7"]
    report = json.loads((result / "report.json").read_text())
    assert found["score"][0] == f"top-1 {report['accuracy']['onnx']:.2f} %"
    assert found["verdict"][0] in ("passed", "slower than float")


def test_what_cannot_be_compared_is_said(result: Path, tmp_path: Path) -> None:
    same = changed(result, tmp_path / "same")
    other = changed(result, tmp_path / "other", processor="another", source="b.py", batch=9)
    assert cautions([read_held(result), read_held(same)]) == []
    said = cautions([read_held(result), read_held(other)])
    assert [line.split()[1] for line in said] == ["machines", "batch", "models"]


def test_json_has_the_numbers(result: Path, tmp_path: Path) -> None:
    other = changed(result, tmp_path / "b", integer_ms=0.5)
    done = CliRunner().invoke(app, ["compare", str(result), str(other), "--json"])
    first, second = json.loads(done.output)
    assert second["integer_ms"] == 0.5
    assert first["onnx_bytes"] == json.loads((result / "report.json").read_text())["onnx_bytes"]


def test_one_result_is_too_few(result: Path) -> None:
    done = CliRunner().invoke(app, ["compare", str(result)])
    assert done.exit_code == 2
    assert "two result folders or more" in done.output
