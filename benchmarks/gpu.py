"""What only a GPU can show, in order of value, as much as fits in the minutes that there are.

    python benchmarks/gpu.py --minutes 14 [--out FOLDER] [--plan] [--rehearse]

Each part is a command of its own with a share of the minutes. What a part prints goes to FOLDER/PART.log while it
runs, and its end with the machine to FOLDER/parts.jsonl. A part that is done is not run again; one that ran out of time
goes on from the rows that it finished. --plan prints what would run. --rehearse gives every part the least that it
works with, so that all of it runs on a CPU in a few minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cifar_networks import NETWORKS
from training import machine

HERE = Path(__file__).parent
EXAMPLE = HERE.parent / "examples" / "fashion" / "model.py"
TIMED = ("resnet20", "resnet18", "mobilenet_v2", "vit_tiny")
DONE, OUT_OF_TIME, FAILED = "done", "out of time", "failed"


@dataclass(frozen=True)
class Part:
    """One command.

    Attributes:
        name: of its log file.
        what: it shows, for the plan.
        least: seconds without which it is not begun.
        most: seconds after which it is ended.
        command: behind the interpreter.
        rehearsal: the same with the least work.
    """

    name: str
    what: str
    least: float
    most: float
    command: tuple[str, ...]
    rehearsal: tuple[str, ...]


@dataclass(frozen=True)
class Ended:
    """How a part ended; `seconds` on the clock, and the machine that it ran on."""

    part: str
    status: str
    seconds: float
    machine: str
    date: str


def parts(out: Path) -> list[Part]:
    """All parts, the most valuable first."""
    tests = ("-m", "pytest", "-n0", "-q", str(HERE.parent / "tests" / "engine" / "test_cuda.py"))
    run = ("-m", "sqakd_fx", "quantize", str(EXAMPLE), "--out", str(out / "example"))
    found = [
        Part("cuda-tests", "the tests that need a GPU", 20, 90, tests, tests),
        Part(
            "command-line",
            "the example from the command to the file, validated under the CUDA provider",
            20,
            120,
            run,
            (*run, "--steps", "2"),
        ),
    ]
    training = str(HERE / "training.py")
    for name in TIMED:
        timed = (training, name, "--rows", "float*", "ours*")
        short = (training, name, "--rows", "ours w4a4 eager", "--seconds", "1", "--batch", "4")
        what = f"training steps of {name}: time and memory beside float"
        found.append(Part(f"training-{name}", what, 40, 100, (*timed, "--seconds", "4"), short))
    accuracy = (str(HERE / "accuracy.py"), "--out", str(out / "accuracy"))
    long_rows = (
        ("presets", ("default-w*a*-sqakd",)),
        ("labels", ("default-w*a*-labels",)),
        ("families", ("*-w2a2-sqakd",)),
    )
    for name, rows in long_rows:
        long = (*accuracy, *rows, "--epochs", "20", "--seeds", "0", "1", "2", "--at-once", "16")
        short = (*accuracy, "default-w8a8-sqakd", "--steps", "2")
        what = f"accuracy over 20 epochs, three seeds: {', '.join(rows)}"
        found.append(Part(f"accuracy-{name}", what, 120, 3600, long, short))
    return [*found, *_teachers(out)]


def _teachers(out: Path) -> list[Part]:
    """Better float networks, and the presets from each."""
    found = []
    for name in NETWORKS:
        folder, short_folder = out / "teachers", out / "rehearsed"
        train = (str(HERE / "teachers.py"), name, "--out")
        least = (str(short_folder), "--epochs", "1", "--images", "256")
        what = f"a float {name} on CIFAR-10, 200 epochs"
        long, short = (*train, str(folder)), (*train, *least)
        found.append(Part(f"teacher-{name}", what, 60, 3600, long, short))
        rows = (str(HERE / "accuracy.py"), "--network", name, "--out", str(out / "accuracy"))
        weights = f"{name}.safetensors"
        all_rows = ("default-w*a*-sqakd", "--epochs", "20", "--seeds", "0", "1", "2")
        long = (*rows, "--weights", str(folder / weights), *all_rows, "--at-once", "16")
        one_row = ("default-w8a8-sqakd", "--steps", "2", "--set", 'compile="never"')
        short = (*rows, "--weights", str(short_folder / weights), *one_row)
        what = f"accuracy of the presets from that {name}, 20 epochs, three seeds"
        found.append(Part(f"accuracy-{name}", what, 120, 3600, long, short))
    return found


def planned(
    order: Sequence[Part], minutes: float, done: Sequence[str] = ()
) -> list[tuple[Part, float]]:
    """The parts that are begun where each takes all that it may, with the seconds that it may take."""
    left, found = 60 * minutes, []
    for part in order:
        if part.name in done or left < part.least:
            continue
        seconds = min(part.most, left)
        found.append((part, seconds))
        left -= seconds
    return found


def finished(out: Path) -> list[str]:
    """The parts whose last end in FOLDER/parts.jsonl is that they were done."""
    path = out / "parts.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    last = {one["part"]: one["status"] for one in map(json.loads, lines)}
    return [name for name, status in last.items() if status == DONE]


def run(
    order: Sequence[Part],
    minutes: float,
    out: Path,
    *,
    rehearse: bool = False,
    on_end: Callable[[Ended], None] = lambda ended: None,
) -> list[Ended]:
    """Run what fits and is not done; every end is written before the next part begins."""
    out.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 60 * minutes
    ends = []
    done = finished(out)
    for part in order:
        left = until - time.monotonic()
        if part.name in done or left < part.least:
            continue
        command = (sys.executable, *(part.rehearsal if rehearse else part.command))
        started = time.monotonic()
        status = _run(command, out / f"{part.name}.log", min(part.most, left))
        seconds = round(time.monotonic() - started, 1)
        ended = Ended(part.name, status, seconds, machine(), time.strftime("%Y-%m-%d"))
        with (out / "parts.jsonl").open("a") as file:
            file.write(json.dumps(asdict(ended)) + "\n")
        on_end(ended)
        ends.append(ended)
    return ends


def _run(command: Sequence[str], log: Path, limit: float) -> str:
    """How the command ended; what it started ends with it."""
    with log.open("ab") as file:
        started = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = started.wait(timeout=limit)
        except BaseException as error:
            os.killpg(started.pid, signal.SIGTERM)
            try:
                started.wait(timeout=5)
            except subprocess.TimeoutExpired:
                os.killpg(started.pid, signal.SIGKILL)
                started.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                return OUT_OF_TIME
            raise
    return DONE if status == 0 else f"{FAILED} with exit code {status}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--out", type=Path, default=Path("sqakd-out/gpu"))
    parser.add_argument("--plan", action="store_true", help="print what would run")
    parser.add_argument("--rehearse", action="store_true", help="every part with the least work")
    options = parser.parse_args()
    order = parts(options.out)
    if options.plan:
        for part, seconds in planned(order, options.minutes, finished(options.out)):
            print(f"at most {seconds:4.0f} s  {part.name}: {part.what}")
        return
    print(machine(), flush=True)
    ends = run(
        order,
        options.minutes,
        options.out,
        rehearse=options.rehearse,
        on_end=lambda e: print(f"{e.seconds:6.1f} s  {e.part}: {e.status}", flush=True),
    )
    wrong = [one.part for one in ends if one.status.startswith(FAILED)]
    raise SystemExit(f"failed: {', '.join(wrong)}" if wrong else 0)


if __name__ == "__main__":
    main()
