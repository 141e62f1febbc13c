"""One run at a time writes to a result folder, and a finished result is replaced as a whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sqakd_fx
from sqakd_fx.errors import StorageError
from sqakd_fx.pipeline import Silent
from sqakd_fx.recipe.resolution import resolve_recipe
from sqakd_fx.results.folder import default_folder, held_folder, publish, settle, staged
from sqakd_fx.storage import remove_temporaries, write_text

HOLD = """
import sys, time
from pathlib import Path
from sqakd_fx.results.folder import held_folder
with held_folder(Path(sys.argv[1]), resume=False):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_told_and_a_dead_one_holds_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(StorageError, match=rf"process {other.pid}.*choose another --out"),
            held_folder(tmp_path / "out", resume=False),
        ):
            pass
        other.send_signal(signal.SIGKILL)
    with held_folder(tmp_path / "out", resume=False):
        with pytest.raises(StorageError), held_folder(tmp_path / "out", resume=False):
            pass
        assert staged(tmp_path / "out").is_dir()
    with held_folder(tmp_path / "out", resume=True):
        pass


def filled(out: Path) -> None:
    """A finished result beside a file of the user's, and a new one that waits."""
    out.mkdir()
    made = ("model.packed.onnx", "model.qnn.onnx", "model.qnn.encodings", "report.html")
    for name in ("model.onnx", "report.json", *made, "notes.txt"):
        (out / name).write_text("old")
    for name in ("model.onnx", "report.json"):
        (staged(out) / name).write_text("new")


def read(out: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in out.iterdir()}


PUBLISHED = {"model.onnx": "new", "report.json": "new", "notes.txt": "old"}


def test_a_result_is_replaced_with_all_that_was_exported_of_it(tmp_path: Path) -> None:
    filled(tmp_path / "out")
    publish(tmp_path / "out")
    assert read(tmp_path / "out") == PUBLISHED


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_what_died_between_two_files_is_finished_by_the_next_reader(
    tmp_path: Path, moved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    filled(out)
    monkeypatch.setattr("sqakd_fx.results.folder.settle", lambda out: None)
    publish(out)
    for name in ("model.onnx", "report.json")[:moved]:
        (out / ".done" / name).replace(out / name)
    settle(out)
    assert read(out) == PUBLISHED


def test_a_link_in_the_place_of_a_result_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("mine")
    out = tmp_path / "out"
    out.mkdir()
    (out / ".done").symlink_to(tmp_path / "precious")
    (out / ".new").symlink_to(tmp_path / "precious")
    settle(out)
    write_text(out / ".sqakd-fx", "{}")
    with held_folder(out, resume=False):
        pass
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "mine"


def test_leftovers_of_dead_processes_are_removed_and_other_hidden_files_stay(
    tmp_path: Path,
) -> None:
    write_text(tmp_path / ".sqakd-fx", "{}")
    (tmp_path / "checkpoints").mkdir()
    gone = [".tmpAb3dE9", "checkpoints/.tmpZZZZZZ", ".report.tmp-99999999.md"]
    stay = [".gitignore", f".report.tmp-{os.getpid()}.md", ".tmpfile-of-mine"]
    for name in (*gone, *stay):
        (tmp_path / name).touch()
    alive = f".export-{os.getpid()}-abc"
    for folder in (".export-abc", ".export-99999999-abc", alive):
        (tmp_path / folder / ".within").mkdir(parents=True)
    remove_temporaries(tmp_path)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left == {".sqakd-fx", "checkpoints", alive, f"{alive}/.within", *stay}


@pytest.mark.parametrize("left", [[], [".tmpAb3dE9"], ["..sqakd-fx.tmp-99999999"]], ids=str)
def test_a_process_killed_at_once_leaves_a_folder_that_is_taken(
    tmp_path: Path, left: list[str]
) -> None:
    for name in left:
        (tmp_path / name).touch()
    with held_folder(tmp_path, resume=True):
        assert (tmp_path / ".sqakd-fx").is_file()


def test_each_recipe_of_a_model_has_a_folder_of_its_own() -> None:
    names = {
        str(default_folder("net", resolve_recipe(*recipe[:1], **recipe[1]))): recipe
        for recipe in (
            ("w4a4", {}), ("w2a2", {}), ("paper/ewgs-w4a4", {}), ({"weight_bits": 3}, {}),
            ("w4a4", {"weight_bits": 5}),
        )
    }  # fmt: skip
    assert set(names) == {
        "sqakd-out/net-w4a4", "sqakd-out/net-w2a2", "sqakd-out/net-paper-ewgs-w4a4",
        "sqakd-out/net-custom-w3a4", "sqakd-out/net-w4a4-w5a4",
    }  # fmt: skip
    assert default_folder("../../[x]\x1b", resolve_recipe("w4a4")).parent == Path("sqakd-out")


class Notes(Silent):
    def __init__(self) -> None:
        self.told: list[str] = []

    def note(self, text: str) -> None:
        self.told.append(text)


def quantized(
    out: Path, *, resume: bool = False, force: bool = False, **keys: Any
) -> tuple[Any, list[str]]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    rows, notes = torch.randn(64, 6), Notes()
    recipe = {"steps": 2, "batch_size": 16, "held_out": 0} | keys
    going_on = {"resume": resume, "force": force, "observer": notes}
    made = sqakd_fx.quantize(net, rows, example_inputs=rows[:2], recipe=recipe, out=out, **going_on)
    return made, notes.told


def test_a_late_fault_leaves_the_old_result_and_the_trained_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    made, _ = quantized(out, steps=4)
    model = made.model_path.read_bytes()
    assert made.model_path == out / "model.onnx"
    files = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file() and p.name != ".lock"}
    mode = (out / "model.onnx").stat().st_mode
    assert {p.stat().st_mode for p in out.iterdir() if p.suffix in (".safetensors", ".json")} == {
        mode
    }
    again, notes = quantized(out, resume=True)
    assert again is None
    assert "is finished" in notes[0]

    def fails(*_: Any, **__: Any) -> Any:
        raise StorageError("late")

    with monkeypatch.context() as patched:
        patched.setattr("sqakd_fx.pipeline.make_report", fails)
        with pytest.raises(StorageError, match="late"):
            quantized(out, steps=4)
    assert files == {
        p.name: p.read_bytes() for p in out.iterdir() if p.is_file() and p.name != ".lock"
    }
    kept = {p: p.read_bytes() for p in (out / "checkpoints").iterdir()}
    with pytest.raises(StorageError, match=r"stopped run, trained to step 4: go on with --resume"):
        quantized(out, steps=4)
    assert kept == {p: p.read_bytes() for p in (out / "checkpoints").iterdir()}
    assert (out / ".new" / "student.safetensors").exists()
    rescued, notes = quantized(out, steps=4, resume=True)
    assert any("resumed at step 4 of 4" in note for note in notes)
    assert rescued.model_path.read_bytes() == model
    assert not (out / ".new").exists()
    assert not (out / "checkpoints").exists()


def test_a_stopped_run_is_begun_anew_with_force_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def fails(*_: Any, **__: Any) -> Any:
        raise StorageError("late")

    with monkeypatch.context() as patched:
        patched.setattr("sqakd_fx.pipeline.make_report", fails)
        with pytest.raises(StorageError, match="late"):
            quantized(out)
    _, notes = quantized(out, steps=3, force=True)
    assert not any("resumed" in note for note in notes)
    quantized(out)
