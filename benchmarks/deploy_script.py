"""Runs deploy.py of three results in an environment that holds numpy and onnxruntime alone.

    python benchmarks/deploy_script.py [--environment FOLDER]

The results are the example, a transformer of two inputs and a detector, calibrated. Each runs at several batch sizes,
the last two at several sizes as well. The environment is made by `python -m venv` and pip where it is not there.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from results.test_deploy_script import Detector, Tokens

from sqakd_fx.program import build_program, lower
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.results.deploy_script import write_deploy_script
from sqakd_fx.results.export import export
from sqakd_fx.source.source import load_source

EXAMPLE = Path(__file__).parents[1] / "examples" / "fashion" / "model.py"
CASES: dict[str, tuple[Any, tuple[tuple[str, ...], ...]]] = {
    "the example": ({}, ((), ("1",), ("33",))),
    "a transformer of two inputs": (
        {"*": {"length": 1}},
        ((), ("1", "length=3"), ("5", "length=17"), ("2", "length=64")),
    ),
    "a detector": (
        {"image": {"height": 2, "width": 3}},
        ((), ("1", "height=64", "width=64"), ("3", "height=32", "width=96"), ("2", "height=6")),
    ),
}


def model_of(name: str) -> tuple[torch.nn.Module, tuple[Any, ...]]:
    if name == "the example":
        source = load_source(str(EXAMPLE))
        return source.model, source.example_inputs
    if name == "a detector":
        return Detector(), (torch.randn(2, 3, 8, 8),)
    return Tokens(), (torch.randint(0, 20, (2, 6)), torch.ones(2, 6, dtype=torch.bool))


def written(name: str, dynamic: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    model, example = model_of(name)
    program = build_program(model.eval(), example, {"preset": "w8a8", "dynamic": dynamic})
    calibrate(program.student, [program.example], method="minmax")
    exported = export(program, lower(program.student).graph_module, folder / "model.onnx")
    return write_deploy_script(program, exported.path)


def environment(folder: Path) -> Path:
    """The interpreter of an environment with numpy and onnxruntime, and what they need."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "numpy", "onnxruntime"], check=True)
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--environment", type=Path)
    options = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        python = environment(options.environment or Path(temporary) / "environment")
        done = subprocess.run([python, "-c", "import torch"], capture_output=True)
        if not done.returncode:
            raise SystemExit(f"{python} finds torch: name an environment without it")
        for name, (dynamic, calls) in CASES.items():
            folder = Path(temporary) / name.replace(" ", "-")
            folder.mkdir()
            script = written(name, dynamic, folder)
            for call in calls:
                ran = subprocess.run([python, script, *call], capture_output=True, text=True)
                failed += ran.returncode != 0
                said = "; ".join(ran.stdout.splitlines()) if not ran.returncode else ran.stderr
                print(f"{name}, deploy.py {' '.join(call)}: {said}", flush=True)
    raise SystemExit(f"{failed} calls failed" if failed else 0)


if __name__ == "__main__":
    main()
