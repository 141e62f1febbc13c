"""Ctrl-C and SIGTERM are one sentence and exit status 130, also outside of training."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

STOPPED = "sqakd-fx: stopped; nothing half-written was left\n"
NOT_IGNORED = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
"""A process that a shell starts in the background ignores Ctrl-C, and so do those that it starts."""
SENDS = "import os, signal, time; os.kill(os.getpid(), signal.{}); time.sleep(9)\n"


def outcome(code: str, folder: Path) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_a_command_that_does_not_train(tmp_path: Path, name: str) -> None:
    command = NOT_IGNORED + (
        "from sqakd_fx.cli import main as m\n"
        "from sqakd_fx.cli.friendly import friendly\n"
        f"def wait():\n    {SENDS.format(name)}"
        "m.app = lambda: m.typer.main.get_command(app)()\n"
        "app = m.typer.Typer(); app.command()(friendly(wait))\n"
        "m.main()\n"
    )
    assert outcome(command, tmp_path) == (130, STOPPED)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_while_a_library_is_imported_ends_the_process_at_once(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / "library.py").write_text(
        f"try:\n    {SENDS.format(name)}except KeyboardInterrupt:\n    print('taken')\n"
    )
    code = NOT_IGNORED + (
        "from sqakd_fx.cli.stopping import stop_on_signals\n"
        "stop_on_signals()\nimport library\nprint('went on')"
    )
    assert outcome(code, tmp_path) == (130, STOPPED)


def test_a_process_that_loads_data_ends_in_silence(tmp_path: Path) -> None:
    code = (
        "import os, signal\n"
        "from sqakd_fx.cli.stopping import stop_on_signals\n"
        "stop_on_signals()\n"
        "child = os.fork()\n"
        f"if not child:\n    {SENDS.format('SIGTERM')}"
        "raise SystemExit(os.WTERMSIG(os.waitpid(child, 0)[1]))\n"
    )
    assert outcome(code, tmp_path) == (15, "")


def test_a_signal_that_a_shell_ignores_stays_ignored(tmp_path: Path) -> None:
    code = (
        "import os, signal\n"
        "from sqakd_fx.cli.stopping import stop_on_signals\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "stop_on_signals()\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
    )
    assert outcome(code, tmp_path) == (0, "")
