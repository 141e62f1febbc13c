"""The other end of a worker: starts it in its environment, sends commands, reads answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peers.environment import PINNED, python_of

WORKER = Path(__file__).parent / "worker.py"


class WorkerFailed(Exception):
    """What a worker said before it gave up."""


class Worker:
    """A running worker; what it prints is kept in `log`."""

    def __init__(self, adapter: str, folder: Path, name: str, setup: Mapping[str, Any]) -> None:
        python = str(python_of(adapter, folder)) if adapter in PINNED else sys.executable
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"{name.replace(' ', '-')}.log"
        # NNCF builds an extension at its first import, with ninja, and gives up after a minute.
        environment = os.environ | {
            "NNCF_EXTENSION_LOAD_TIMEOUT": "0",
            "PYTHONPATH": _before(WORKER.parents[1], "PYTHONPATH"),
            "PATH": _before(Path(python).parent, "PATH"),
        }
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [python, "-W", "ignore", str(WORKER), adapter],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                bufsize=1,
                env=environment,
            )
        self.send(setup)

    def send(self, values: Mapping[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(dict(values)) + "\n")
        self.process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """The next answer.

        Raises:
            WorkerFailed: the worker reports an error, or ended.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise WorkerFailed(f"ended without a word, see {self.log}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerFailed(str(answer["error"]))
        return answer

    def ask(self, do: str) -> dict[str, Any]:
        self.send({"do": do})
        return self.receive()

    def close(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()


def _before(path: Path, variable: str) -> str:
    """The value of a list of paths with one more in front."""
    return os.pathsep.join(filter(None, (str(path), os.environ.get(variable))))
