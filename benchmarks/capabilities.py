"""What releases of ONNX Runtime do with every form that exported models use: a table.

    python benchmarks/capabilities.py [VERSION ...] [--folder FOLDER] [--table FILE]

Each release of the package onnxruntime is installed into an environment of its own, which is kept in
FOLDER; without VERSION the installed runtime is asked.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

from peers.environment import default_folder

from sqakd_fx.results.machine import processor_facts, processor_name

ROOT = Path(__file__).parents[1]
WORDS = {
    "INTEGER": "integer",
    "FLOAT": "float",
    "REFUSED": "refused",
    "FALLBACK": "on the CPU",
    "ABSENT": "does not start",
}
HEADER = """# What ONNX Runtime runs on integer kernels

    python benchmarks/capabilities.py {versions} --table docs/capabilities.md

installs these releases of `onnxruntime` beside each other. Every form that exported models use is loaded as a
model of its own, and the graph that the runtime makes of it is read. `sqakd-fx capabilities` asks the installed one.

- **integer**: no operator reads a dequantized tensor.
- **float**: one does.
- **refused**: the model does not load.
- **on the CPU**: the provider leaves at least one operator to the CPU. One that runs none of them itself, like Azure,
  has no column.
- "Cast": the stored codes go through a Cast to INT8 that is folded at load.

 Processor: {processor}.

"""


def python_of(release: str, folder: Path) -> Path:
    """The interpreter of a release's environment, which is made where it is not there.

    Raises:
        subprocess.CalledProcessError: pip fails.
    """
    home = folder / f"onnxruntime-{release}"
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not (home / "finished").exists():
        print(f"making the environment of onnxruntime {release} in {home}", file=sys.stderr)
        venv.create(home, with_pip=True, clear=True)
        install = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([*install, f"onnxruntime=={release}", "onnx-ir", "numpy"], check=True)
        (home / "finished").touch()
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", str(ROOT)], check=True)
    return python


def answers(python: Path) -> dict[str, Any]:
    """{"version": ..., "providers": {provider: {form: answer}}} of an environment."""
    command = [python, "-m", "sqakd_fx.runtime.capabilities"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=python.parent)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def markdown(found: list[dict[str, Any]]) -> str:
    """A row for each form, a column for each release and provider that runs any of them itself."""
    columns = {
        f"{one['version']} {provider.removesuffix('ExecutionProvider')}": told
        for one in found
        for provider, told in one["providers"].items()
        if set(told.values()) & {"INTEGER", "FLOAT"}
    }
    forms = dict.fromkeys(form for told in columns.values() for form in told)
    lines = [f"| form | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for form in forms:
        cells = [WORDS[told[form]] for told in columns.values()]
        lines.append(f"| {form} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def processor() -> str:
    """What the kernel calls it, with what decides which integer kernels there are."""
    vnni = " with AVX512-VNNI" if "avx512_vnni" in processor_facts() else ""
    return f"{processor_name()}{vnni}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*")
    parser.add_argument("--folder", type=Path, default=default_folder().parent / "runtimes")
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    pythons = [python_of(release, options.folder) for release in options.versions]
    table = markdown([answers(python) for python in pythons or [Path(sys.executable)]])
    print(table, end="")
    if options.table:
        head = HEADER.format(versions=" ".join(options.versions), processor=processor())
        options.table.write_text(head + table)


if __name__ == "__main__":
    main()
