"""A killed run goes on from its last checkpoint and ends with the same bytes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sqakd_fx.errors import StorageError
from sqakd_fx.storage import claim_output_folder, write_text
from sqakd_fx.training.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint

MODEL = """
import torch
from torch import nn
torch.set_num_threads(1)
def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4),
        nn.ReLU(), nn.Flatten(), nn.Linear(64, 3),
    )
def example_inputs(): return torch.zeros(2, 1, 8, 8)
def train_data():
    return torch.randn(320, 1, 8, 8, generator=torch.Generator().manual_seed(1))
"""
KILLS = Path(__file__).parents[2] / "benchmarks" / "kills.py"
COMMAND = [
    "quantize", "model.py", "--steps", "400", "--set", "checkpoint_steps=20", "--set", "batch_size=32",
    "--set", "batch_norm=absorb",
]  # fmt: skip


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "sqakd_fx", *COMMAND, *more],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("whole")
    (folder / "model.py").write_text(MODEL)
    run = start(folder, "--out", "out")
    _, error = run.communicate(timeout=300)
    assert run.returncode in (0, 1), error
    return (folder / "out" / "model.onnx").read_bytes()


def wait_for_checkpoint(folder: Path, run: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 120
    while run.poll() is None and time.monotonic() < until:
        if list((folder / "out" / "checkpoints").glob("*.json")):
            return
        time.sleep(0.02)


def test_runs_killed_at_random_moments_end_with_the_same_bytes(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    asked = ["--count", "3", "--record", str(record), "--only", "over an earlier result"]
    done = subprocess.run(
        [sys.executable, str(KILLS), *asked], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads(record.read_text()).values()
    assert sum(found["kills"].values()) == 3
    assert found["ends"] >= 1


def test_a_killed_run_with_crafts_and_cached_outputs_ends_with_the_same_bytes(
    tmp_path: Path,
) -> None:
    callback = [
        "--set", "progressive=[8]", "--set", "weight_average=0.9", "--set", "cache_teacher=true",
        "--set", "freeze_oscillations=0.01", "--set", "freeze_from=0.1",
    ]  # fmt: skip
    models: list[bytes] = []
    for kills in (0, 1):
        folder = tmp_path / str(kills)
        folder.mkdir()
        (folder / "model.py").write_text(MODEL)
        for _ in range(kills):
            run = start(folder, "--out", "out", *callback)
            wait_for_checkpoint(folder, run)
            time.sleep(random.Random(1).uniform(0, 0.5))
            run.send_signal(signal.SIGKILL)
            run.communicate()
            assert run.returncode == -signal.SIGKILL
            assert list((folder / "out" / "teacher-outputs").glob("rows-*"))
        run = start(folder, "--out", "out", *callback, *(["--resume"] if kills else []))
        _, error = run.communicate(timeout=300)
        assert run.returncode in (0, 1), error
        assert ("resumed at step" in error) == bool(kills)
        assert not (folder / "out" / "teacher-outputs").exists()
        models.append((folder / "out" / "model.onnx").read_bytes())
    assert models[0] == models[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_step_and_says_how_to_go_on(
    tmp_path: Path, number: signal.Signals, uninterrupted: bytes
) -> None:
    (tmp_path / "model.py").write_text(MODEL)
    run = start(tmp_path, "--out", "out")
    wait_for_checkpoint(tmp_path, run)
    run.send_signal(number)
    _, error = run.communicate(timeout=120)
    assert run.returncode == 130, error
    assert "--resume" in error
    assert "Traceback" not in error
    again = start(tmp_path, "--out", "out", "--resume")
    _, error = again.communicate(timeout=300)
    assert (tmp_path / "out" / "model.onnx").read_bytes() == uninterrupted, error


def checkpoint(step: int) -> Checkpoint:
    tensors = {
        "a": torch.randn(3, 4).t(),
        "b": torch.tensor(7, dtype=torch.int64),
        "c": torch.randn(5).bfloat16(),
        "d": torch.tensor([True, False]),
    }
    return Checkpoint(step, tensors, {"rate": 0.5, "list": [1, None]})


def test_a_checkpoint_round_trips_bit_for_bit(tmp_path: Path) -> None:
    saved = checkpoint(3)
    save_checkpoint(tmp_path, saved)
    loaded, notes = latest_checkpoint(tmp_path)
    assert loaded is not None
    assert not notes
    assert loaded.state == saved.state
    assert all(torch.equal(loaded.tensors[k], v) for k, v in saved.tensors.items())
    assert {k: v.dtype for k, v in loaded.tensors.items()} == {
        k: v.dtype for k, v in saved.tensors.items()
    }


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "no checksum"])
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(tmp_path: Path, damage: str) -> None:
    save_checkpoint(tmp_path, checkpoint(1))
    path = save_checkpoint(tmp_path, checkpoint(2))
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[:-10])
    elif damage == "flipped":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.with_suffix(".json").unlink()
    loaded, notes = latest_checkpoint(tmp_path)
    assert loaded is not None
    assert loaded.step == 1
    assert "step-00000002" in notes[0]


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in range(5):
        save_checkpoint(tmp_path, checkpoint(step), keep=2)
    assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == [
        "step-00000003.safetensors",
        "step-00000004.safetensors",
    ]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting a tmpfs needs root")
def test_a_full_disk_is_one_sentence_and_keeps_the_earlier_checkpoint(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no tmpfs here")
    try:
        save_checkpoint(disk, checkpoint(1))
        big = Checkpoint(2, {"a": torch.zeros(100_000)}, {})
        with pytest.raises(StorageError, match="no space"):
            save_checkpoint(disk, big)
        loaded, _ = latest_checkpoint(disk)
        assert loaded is not None
        assert loaded.step == 1
        assert not list(disk.glob(".*"))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_folder_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(StorageError, match="not made by sqakd-fx"):
        claim_output_folder(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "report.md"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.md"]
