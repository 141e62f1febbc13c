"""Run the README's first commands and draw what they print: docs/images/run.svg.

python benchmarks/picture.py
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "run.svg"
COMMANDS = ("sqakd-fx example", "sqakd-fx quantize fashion/model.py")
COLUMNS = 104


def printed(command: str, folder: str) -> str:
    """What a command prints into a pipe, in the order in which it prints it."""
    program, *arguments = command.split()
    run = subprocess.run(
        [sys.executable, "-m", program.replace("-", "_"), *arguments],
        cwd=folder,
        env=os.environ | {"COLUMNS": str(COLUMNS), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    return run.stdout


def main() -> None:
    screen = Console(record=True, width=COLUMNS, file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        for command in COMMANDS:
            screen.print(Text(f"$ {command}", "bold green"))
            for line in printed(command, folder).splitlines():
                screen.print(Text(line.rstrip()), soft_wrap=len(line) <= COLUMNS)
    PICTURE.parent.mkdir(exist_ok=True)
    drawn = screen.export_svg(title="sqakd-fx", unique_id="run")
    # without the fonts that rich's picture would ask another host for
    PICTURE.write_text(re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.S), encoding="utf-8")
    print(f"{PICTURE} {PICTURE.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
