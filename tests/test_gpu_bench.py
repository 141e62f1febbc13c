"""The order of what a GPU is used for: nothing that is finished is lost or run again."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from gpu import DONE, OUT_OF_TIME, TIMED, Part, finished, parts, planned, run  # noqa: E402
from plain import NETWORKS  # noqa: E402


def part(name: str, code: str, *, least: float = 0.1, most: float = 30.0) -> Part:
    return Part(name, name, least, most, ("-c", code), ("-c", f"print('rehearsed {name}')"))


def test_a_plan_has_the_most_valuable_first_and_never_more_than_the_minutes(tmp_path: Path) -> None:
    order = parts(tmp_path)
    for minutes in (5, 10, 14):
        plan = planned(order, minutes)
        assert plan[0][0].name == "cuda-tests"
        assert sum(seconds for _, seconds in plan) <= 60 * minutes
        assert [p for p in order if p in [one for one, _ in plan]] == [one for one, _ in plan]
    assert len(planned(order, 14)) > len(planned(order, 5))
    assert planned(order, 14, done=["cuda-tests"])[0][0].name == "command-line"


def test_a_finished_part_is_not_run_again_and_another_goes_on(tmp_path: Path) -> None:
    first, second = part("first", "print('ran')"), part("second", "import time; time.sleep(60)")
    ends = run([first, replace(second, most=2.0)], 1, tmp_path)
    assert [one.status for one in ends] == [DONE, OUT_OF_TIME]
    assert finished(tmp_path) == ["first"]
    again = run([first, part("second", "print('went on')")], 1, tmp_path)
    assert [one.part for one in again] == ["second"]
    assert finished(tmp_path) == ["first", "second"]
    assert (tmp_path / "first.log").read_text() == "ran\n"
    assert (tmp_path / "second.log").read_text() == "went on\n"
    lines = [json.loads(line) for line in (tmp_path / "parts.jsonl").read_text().splitlines()]
    assert all(line["machine"] and line["date"] for line in lines)


def test_a_part_that_fails_does_not_keep_the_next_from_running(tmp_path: Path) -> None:
    ends = run([part("bad", "raise SystemExit(3)"), part("good", "")], 1, tmp_path)
    assert [one.status for one in ends] == ["failed with exit code 3", DONE]


def test_a_part_that_needs_more_than_is_left_is_not_begun(tmp_path: Path) -> None:
    assert run([part("long", "", least=600)], 1, tmp_path) == []


def test_a_rehearsal_runs_the_least_work(tmp_path: Path) -> None:
    run([part("one", "raise SystemExit(1)")], 1, tmp_path, rehearse=True)
    assert (tmp_path / "one.log").read_text() == "rehearsed one\n"


def test_every_script_of_the_plan_starts(tmp_path: Path) -> None:
    for script in {one.command[0] for one in parts(tmp_path)} - {"-m"}:
        done = subprocess.run([sys.executable, script, "--help"], capture_output=True)
        assert done.returncode == 0, script
    assert NETWORKS.keys() >= set(TIMED)


def test_the_plan_is_printed(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--minutes", "10", "--plan"]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cuda-tests: the tests that need a GPU" in done.stdout
