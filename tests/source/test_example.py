"""The example that the package carries."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from sqakd_fx.cli.main import app
from sqakd_fx.errors import StorageError
from sqakd_fx.source.example import FILES, example_folder, write_example
from sqakd_fx.source.source import load_source


def test_what_is_written_is_a_model_with_data(tmp_path: Path, clean_imports: None) -> None:
    path = write_example(tmp_path / "new" / "fashion")
    assert {file.name for file in path.parent.iterdir()} == set(FILES)
    source = load_source(str(path))
    images, labels = next(iter(source.eval_data))
    assert source.model(images).argmax(1).eq(labels).float().mean() > 0.85


def test_the_example_is_small_enough_for_a_wheel() -> None:
    assert sum((example_folder() / name).stat().st_size for name in FILES) < 3e6


def test_it_is_written_again_over_itself_and_over_nothing_else(tmp_path: Path) -> None:
    path = write_example(tmp_path)
    assert write_example(tmp_path) == path
    path.write_text("mine")
    (tmp_path / "network.py").unlink()
    with pytest.raises(StorageError, match=r"model\.py is there and is not the example's"):
        write_example(tmp_path)
    assert path.read_text() == "mine"
    assert not (tmp_path / "network.py").exists()


def test_the_command_says_what_comes_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    answered = CliRunner().invoke(app, ["example"])
    assert answered.exit_code == 0
    assert "sqakd-fx quantize fashion/model.py" in answered.stdout
    assert (tmp_path / "fashion" / "LICENSE-DATA").exists()


def test_the_command_refuses_a_file_in_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "fashion").write_text("")
    answered = CliRunner().invoke(app, ["example", str(tmp_path / "fashion")])
    assert answered.exit_code == 2
