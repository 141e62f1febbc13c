"""Runs that are killed at random moments and go on: the same bytes as without a kill, and nothing left behind.

Each set-up is run once to its end. Then runs are killed (SIGKILL) at a random moment and resumed, again and again; one
that comes to its end must have written the same file, and its folder nothing else. Runs of one process are forked from
a process that has imported everything; two processes are started by torchrun, and killed together or one alone.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

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
    """The data of a run, its settings, and how many processes share it."""

    data: str = "ROWS"
    settings: tuple[str, ...] = ()
    processes: int = 1


SET_UPS = {
    "tensor": SetUp(),
    "loader with a generator": SetUp(LOADER),
    "mixing": SetUp(settings=("mixing=mixup",)),
    "cached teacher": SetUp(settings=("cache_teacher=true",)),
    "progressive bits": SetUp(
        settings=("progressive=[8]", "weight_average=0.9", "freeze_oscillations=0.01")
    ),
    "two processes": SetUp(processes=2),
}
_SETTINGS = ("checkpoint_steps=10", "batch_size=32", "batch_norm=absorb")
_ALONE = 0.5
"""Share of kills of two processes that meet one of them alone."""
_ENDS = 300
"""Seconds after which a run has hung."""

Stop = Callable[[], None]


@dataclass
class Run:
    """A run of the command line: its process, what ends it, and what it printed."""

    pid: int
    stop: Stop
    log: Path

    def ended(self, seconds: float) -> bool:
        """Whether the run came to its end within so many seconds."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if os.waitpid(self.pid, os.WNOHANG) != (0, 0):
                return True
            time.sleep(0.02)
        return False

    def last_stage(self) -> str:
        """The stage that had ended last."""
        lines = [line.split() for line in self.log.read_text(errors="replace").splitlines()]
        stages = [words[0] for words in lines if len(words) > 2 and words[2] == "s"]
        return stages[-1] if stages else "load"


def arguments_of(set_up: SetUp, out: str, *, resume: bool) -> list[str]:
    arguments = ["quantize", "model.py", "--steps", "120", "--out", out]
    for text in (*_SETTINGS, *set_up.settings):
        arguments += ["--set", text]
    return [*arguments, "--resume"] if resume else arguments


def start(folder: Path, set_up: SetUp, out: str, *, resume: bool, alone: bool = False) -> Run:
    arguments, log = arguments_of(set_up, out, resume=resume), folder / f"{out}.log"
    if set_up.processes == 1:
        return forked(folder, arguments, log)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={set_up.processes}", "-m", "sqakd_fx", *arguments]
    with log.open("w") as file:
        run = subprocess.Popen(
            command, cwd=folder, stdout=file, stderr=file, start_new_session=True
        )
    return Run(run.pid, lambda: _kill_group(run.pid, alone=alone), log)


def forked(folder: Path, arguments: list[str], log: Path) -> Run:
    """The command in a copy of this process."""
    pid = os.fork()
    if not pid:
        with contextlib.suppress(BaseException):
            os.chdir(folder)
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.argv = ["sqakd-fx", *arguments]
            from sqakd_fx.cli.main import main

            main()
        os._exit(0)
    return Run(pid, lambda: os.kill(pid, signal.SIGKILL), log)


def _kill_group(leader: int, *, alone: bool) -> None:
    """All processes of a torchrun, or one of its workers: torchrun then ends the others."""
    tasks = Path(f"/proc/{leader}/task/{leader}/children")
    workers = [int(pid) for pid in tasks.read_text().split()] if tasks.exists() else []
    if alone and workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(random.choice(workers), signal.SIGKILL)
        return
    for pid in (leader, *workers):  # each worker has a session of its own
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def model_of(folder: Path, out: str) -> bytes | None:
    path = folder / out / "model.onnx"
    return path.read_bytes() if path.exists() else None


def left_in(folder: Path) -> list[str]:
    """What a finished run should not have left."""
    names = [p.name for p in folder.rglob("*") if "tmp" in p.name or p.is_dir()]
    return [*names, *(p.name for p in folder.glob(".*") if p.name not in (".lock", ".sqakd-fx"))]


def kills_campaign(
    count: int, names: tuple[str, ...] = tuple(SET_UPS)
) -> Iterator[tuple[str, str]]:
    """In each set-up so many kills; the stages that had ended before them are told."""

    for name in names:
        chance = random.Random(name)
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            (folder / "model.py").write_text(MODEL.replace("{data}", SET_UPS[name].data))
            yield from _killed(folder, name, max(count // len(names), 1), chance)


def _killed(
    folder: Path, name: str, kills: int, chance: random.Random
) -> Iterator[tuple[str, str]]:
    set_up, stages = SET_UPS[name], Counter[str]()
    started = time.monotonic()
    if not start(folder, set_up, "whole", resume=False).ended(_ENDS):
        raise RuntimeError(f"{name}: the run without a kill does not end")
    seconds = time.monotonic() - started
    wanted, resume, several = model_of(folder, "whole"), False, set_up.processes > 1
    if wanted is None:
        raise RuntimeError(f"{name}: {(folder / 'whole.log').read_text()[-300:]}")
    while (number := sum(stages.values())) <= kills:
        alone = several and chance.random() < _ALONE
        run = start(folder, set_up, "out", resume=resume, alone=alone)
        wait = chance.uniform(0, seconds) if number < kills else _ENDS
        if not run.ended(wait):
            if number == kills:
                run.stop()
                yield f"{name}, resumed after {kills} kills", "no end"
                return
            run.stop()
            stages[run.last_stage()] += 1
            if not run.ended(_ENDS):
                _kill_group(run.pid, alone=False)
                yield f"{name}, kill {number + 1}", "one process lived on without the other"
            resume = True
            continue
        same, left = model_of(folder, "out") == wanted, left_in(folder / "out")
        if not same or left:
            yield (
                f"{name}, resumed after kill {number}",
                f"same bytes: {same}; left: {left}; {run.log.read_text()[-200:]}",
            )
        shutil.rmtree(folder / "out", ignore_errors=True)
        resume = False
        if number == kills:
            break
    told = ", ".join(f"{stage} {n}" for stage, n in stages.most_common())
    yield f"{name}: {kills} kills, the last ended stage was {told}", "success"
