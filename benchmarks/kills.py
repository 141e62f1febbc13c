"""Runs that are killed at random moments and go on: the same bytes as without a kill, and nothing left behind.

    python benchmarks/kills.py --count 240 --record kills.json     goes on where an earlier call stopped
    python benchmarks/kills.py --record kills.json --table docs/faults.md

Each set-up is run once to its end. Then runs are killed (SIGKILL) and resumed, a few times: each when it has printed a
random part of what it prints and up to half a second has passed, so that every stage has its kills. One that comes to
its end must have written the same file, and its folder nothing else. Where the folder had a result before, that one
stands until the new one does. Runs are forked from a process that has imported everything; of two processes both are
killed together, or one alone, and the other then gets SIGTERM, as torchrun sends it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

MODEL = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
torch.set_num_threads(1)
ROWS = torch.randn(320, 1, 8, 8, generator=torch.Generator().manual_seed(1))
def model():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, momentum=None), nn.ReLU(),
        nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, momentum=None), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3),
    )
    net(ROWS)
    return net.eval()
def example_inputs(): return ROWS[:2]
def train_data(): return DATA
DATA = {data}
"""
LOADER = (
    "DataLoader(TensorDataset(ROWS), 32, shuffle=True, generator=torch.Generator().manual_seed(3))"
)


@dataclass(frozen=True)
class SetUp:
    """The data of a run, its settings, how many processes share it, and whether its folder holds a result already."""

    data: str = "ROWS"
    settings: tuple[str, ...] = ()
    processes: int = 1
    again: bool = False


SET_UPS = {
    "tensor": SetUp(),
    "loader with a generator": SetUp(LOADER),
    "a generator": SetUp("iter(ROWS.split(32))"),
    "a process that loads data": SetUp("TensorDataset(ROWS)", ("workers=1",)),
    "mixing": SetUp(settings=("mixing=mixup",)),
    "cached teacher": SetUp(settings=("cache_teacher=true",)),
    "progressive bits": SetUp(
        settings=("progressive=[8]", "weight_average=0.9", "freeze_oscillations=0.01")
    ),
    "over an earlier result": SetUp(again=True),
    "two processes": SetUp(processes=2),
}
_SETTINGS = ("checkpoint_steps=5", "batch_size=32", "batch_norm=absorb")
_STEPS = 40
_ALONE = 0.5
"""Share of kills of two processes that meet one of them alone."""
_ENDS = 300
"""Seconds after which a run has hung."""
_KILLS = 5
"""Of a run, before it may come to its end."""
_LATER = 0.5
"""Seconds within which it is killed behind the line that it has come to."""
_LAST_STAGE = "\nreport"


@dataclass
class Run:
    """A run of the command line: its processes, how those that ended did, and what they printed."""

    pids: list[int]
    log: Path
    statuses: dict[int, int] = field(default_factory=dict)

    def ended(self, seconds: float) -> bool:
        """Whether the run comes to its end within so many seconds."""
        until = time.monotonic() + seconds
        while True:
            for pid in self.alive():
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self.statuses[pid] = os.waitstatus_to_exitcode(status)
            if not self.alive():
                return True
            if time.monotonic() > until:
                return False
            time.sleep(0.02)

    def passes(self, printed: int, seconds: float) -> bool:
        """Whether it has printed so many characters, and goes on for so many seconds, before it ends."""
        until = time.monotonic() + _ENDS
        while self.log.stat().st_size < printed and time.monotonic() < until:
            if self.ended(0):
                return False
            time.sleep(0.02)
        return not self.ended(seconds)

    def alive(self) -> list[int]:
        return [pid for pid in self.pids if pid not in self.statuses]

    def kill(self, chance: random.Random) -> bool:
        """Kill all processes, or one, and let torchrun's signal end the other; whether they ended."""
        alone = len(self.pids) > 1 and chance.random() < _ALONE
        for pid in [chance.choice(self.pids)] if alone else self.pids:
            self._signal(pid, signal.SIGKILL)
        if alone and not self.ended(2):
            for pid in self.alive():
                self._signal(pid, signal.SIGTERM)
            if not self.ended(30):  # it waits in C++ code, and torchrun kills it
                for pid in self.alive():
                    self._signal(pid, signal.SIGKILL)
        return self.ended(_ENDS)

    def _signal(self, pid: int, number: signal.Signals) -> None:
        if pid not in self.statuses:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def last_stage(self) -> str:
        """The stage that had ended last."""
        lines = [line.split() for line in self.log.read_text(errors="replace").splitlines()]
        stages = [words[0] for words in lines if len(words) > 2 and words[2] == "s"]
        return stages[-1] if stages else "load"

    def fault(self) -> str | None:
        """What is wrong with how it ended."""
        wrong = [status for status in self.statuses.values() if status != 0]
        return f"exit status {wrong[0]}: {self.log.read_text()[-200:]!r}" if wrong else None


def start(folder: Path, set_up: SetUp, out: str, *more: str) -> Run:
    """The command in as many copies of this process as share the run."""
    arguments = ["quantize", "model.py", "--steps", str(_STEPS), "--out", out, *more]
    for text in (*_SETTINGS, *set_up.settings):
        arguments += ["--set", text]
    log, there = folder / f"{out}.log", {}
    if set_up.processes > 1:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        there["WORLD_SIZE"] = str(set_up.processes)
    log.write_text("")
    pids = [forked(folder, arguments, log, there, rank) for rank in range(set_up.processes)]
    return Run(pids, log)


def forked(
    folder: Path, arguments: Sequence[str], log: Path, there: dict[str, str], rank: int
) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 99
    try:
        os.chdir(folder)
        os.environ.update(there | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if there else {})
        output = os.open(log, os.O_WRONLY | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.argv = ["sqakd-fx", *arguments]
        from sqakd_fx.cli.main import main

        main()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def model_of(folder: Path, out: str) -> bytes | None:
    path = folder / out / "model.onnx"
    return path.read_bytes() if path.exists() else None


def left_in(folder: Path) -> list[str]:
    """What a finished run should not have left."""
    names = [p.name for p in folder.rglob("*") if "tmp" in p.name or p.is_dir()]
    return [*names, *(p.name for p in folder.glob(".*") if p.name not in (".lock", ".sqakd-fx"))]


@dataclass
class Tally:
    """Kills by the stage that had ended last, runs that came to their end, and what was wrong."""

    kills: Counter[str] = field(default_factory=Counter)
    ends: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        return sum(self.kills.values())


@dataclass(frozen=True)
class Bench:
    """A set-up in a folder of its own, what it writes and prints without a kill, and what stood there before."""

    folder: Path
    set_up: SetUp
    wanted: bytes
    printed: int
    before: bytes | None

    def _is_untouched(self) -> bool:
        """Whether the earlier result is there as it was."""
        return self.before is not None and model_of(self.folder, "out") == self.before

    def lot(self, kills: int, chance: random.Random, tally: Tally) -> None:
        """One folder, killed so many times and gone on with, until it is finished."""
        out, more = self.folder / "out", ("--force",)
        shutil.rmtree(out, ignore_errors=True)
        if self.before is not None:
            shutil.copytree(self.folder / "before", out)
        left = kills
        while True:
            run = start(self.folder, self.set_up, "out", *more)
            moment = int(chance.random() * self.printed), chance.uniform(0, _LATER)
            if left and run.passes(*moment):
                if not run.kill(chance):
                    tally.faults.append("a process lived on")
                left -= 1
                tally.kills[run.last_stage()] += 1
            elif not run.ended(_ENDS):
                tally.faults.append("no end")
                run.kill(chance)
                return
            elif fault := run.fault():
                tally.faults.append(fault)
                return
            elif "--resume" in more and self._is_untouched():
                more = ("--force",)  # every kill came before the run took the folder
                continue
            else:
                break
            known = (self.before, self.wanted)
            if self.before is not None and model_of(self.folder, "out") not in known:
                tally.faults.append("the earlier result is gone")
            more = ("--resume",)
        tally.ends += 1
        if model_of(self.folder, "out") != self.wanted:
            tally.faults.append(f"other bytes: {run.log.read_text()[-200:]!r}")
        if left_behind := left_in(out):
            tally.faults.append(f"left: {left_behind}")


def prepared(folder: Path, set_up: SetUp) -> Bench:
    """Runs a set-up without a kill; raises RuntimeError where that fails."""
    folder.mkdir()
    (folder / "model.py").write_text(MODEL.replace("{data}", set_up.data))
    before = None
    if set_up.again:
        _to_its_end(start(folder, set_up, "before", "--seed", "7"))
        before = model_of(folder, "before")
    whole = start(folder, set_up, "whole")
    _to_its_end(whole)
    wanted, text = model_of(folder, "whole"), whole.log.read_text()
    assert wanted is not None
    return Bench(folder, set_up, wanted, text.index(_LAST_STAGE) + len(_LAST_STAGE), before)


def _to_its_end(run: Run) -> None:
    if not run.ended(_ENDS) or run.fault():
        raise RuntimeError(f"a run without a kill fails: {run.log.read_text()[-300:]}")


def campaign(
    count: int, tallies: dict[str, Tally], names: Sequence[str] = tuple(SET_UPS)
) -> Iterator[str]:
    """Kills, a lot in each set-up in turn, until there are `count` in all; gives the set-up that had its lot."""
    warm_up()
    with tempfile.TemporaryDirectory() as scratch:
        benches: dict[str, Bench] = {}
        while sum(tally.count for tally in tallies.values()) < count:
            name = min(names, key=lambda one: tallies.setdefault(one, Tally()).count)
            if name not in benches:
                benches[name] = prepared(Path(scratch) / str(len(benches)), SET_UPS[name])
            tally = tallies[name]
            left = count - sum(one.count for one in tallies.values())
            chance = random.Random(f"{name} {tally.count} {tally.ends}")
            benches[name].lot(min(_KILLS, left), chance, tally)
            yield name


def warm_up() -> None:
    """Import in this process what the runs need that are forked from it."""
    import torch
    from torch import nn

    import sqakd_fx
    import sqakd_fx.cli.main
    import sqakd_fx.pipeline
    from sqakd_fx.results.export import check_export

    torch.set_num_threads(1)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    images = torch.randn(8, 1, 8, 8)
    program = sqakd_fx.build_program(net, images[:2], "w8a8")
    sqakd_fx.calibrate(program, images)
    check_export(program)


def kills_campaign(count: int) -> Iterator[tuple[str, str]]:
    """As the campaigns of faults.py: what was done, and "success" or a fault."""
    tallies: dict[str, Tally] = {}
    for _ in campaign(count, tallies):
        pass
    for name, tally in tallies.items():
        for fault in tally.faults:
            yield name, fault
        yield f"{name}: {tally.count} kills behind {_stages(tally)}", "success"


def _stages(tally: Tally) -> str:
    return ", ".join(f"{stage} {n}" for stage, n in tally.kills.most_common())


# -- record and table ---------------------------------------------------------------------------------


def read_record(path: Path) -> dict[str, Tally]:
    if not path.exists():
        return {}
    found: dict[str, Any] = json.loads(path.read_text())
    return {
        name: Tally(Counter(one["kills"]), one["ends"], one["faults"])
        for name, one in found.items()
    }


def write_record(path: Path, tallies: dict[str, Tally]) -> None:
    values = {n: {"kills": t.kills, "ends": t.ends, "faults": t.faults} for n, t in tallies.items()}
    path.write_text(json.dumps(values, indent=1) + "\n")


_MARKS = ("<!-- kills -->\n", "<!-- end of kills -->\n")


def table(tallies: dict[str, Tally]) -> str:
    """Rows of set-ups, with all of them in the last one."""
    total = Tally(
        sum((one.kills for one in tallies.values()), Counter()),
        sum(one.ends for one in tallies.values()),
        [fault for one in tallies.values() for fault in one.faults],
    )
    lines = [
        "| set-up | kills | behind which stage | runs to their end, with the same bytes | faults |"
    ]
    lines.append("|---|---|---|---|---|")
    for name, one in {**tallies, "all": total}.items():
        lines.append(f"| {name} | {one.count} | {_stages(one)} | {one.ends} | {len(one.faults)} |")
    return "\n".join(lines) + "\n"


def put_into(page: Path, text: str) -> None:
    """Replace what stands between the marks of a page."""
    before, _, rest = page.read_text().partition(_MARKS[0])
    _, _, behind = rest.partition(_MARKS[1])
    page.write_text(f"{before}{_MARKS[0]}{text}{_MARKS[1]}{behind}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--count", type=int, default=0, help="kills in all, those of the record included"
    )
    parser.add_argument("--record", type=Path, required=True, help="JSON file of what was done")
    parser.add_argument("--only", nargs="*", default=list(SET_UPS), help="set-ups")
    parser.add_argument("--table", type=Path, help="page whose table is written")
    options = parser.parse_args()
    tallies = read_record(options.record)
    for _ in campaign(options.count, tallies, options.only):
        write_record(options.record, tallies)
    if options.table is not None:
        put_into(options.table, table(tallies))
    faults = [(name, fault) for name, one in tallies.items() for fault in one.faults]
    print(table(tallies), *(f"FAULT {name}: {fault}" for name, fault in faults), sep="\n")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
