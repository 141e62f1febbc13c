"""Networks with open sizes: the exported file against the student at the example's and at three other sizes.

    PYTHONPATH=tests python benchmarks/open_sizes.py [--bits w8a8] [--networks NAME ...]

Weights are random and networks calibrated. One line a network: how many of the sizes the student takes, and how many
codes of the file are not the integer program's there.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from conftest import ResidualNet
from networks import NETWORKS

from sqakd_fx.errors import SqakdError
from sqakd_fx.program import build_program, lower
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.results.export import export
from sqakd_fx.results.other_sizes import calls_of_other_sizes
from sqakd_fx.validation.validate import validate

IMAGE = {"*": {"height": 2, "width": 3}}
OPEN: dict[str, Any] = {
    "residual": IMAGE,
    "own/unet": IMAGE,
    "own/pyramid": IMAGE,
    "own/keyword_spotting": {"*": {"time": 2}},
    "own/transformer_encoder": {"*": {"length": 1}},
    "transformers/bert": {"*": {"length": 1}},
    "transformers/llama": {"*": {"length": 1}},
}


def row(name: str, bits: str, folder: Path) -> list[str]:
    """What holds of one network."""
    torch.manual_seed(0)
    if name == "residual":
        model, args, kwargs = ResidualNet(), (torch.randn(2, 3, 16, 16),), {}
    else:
        model, args, kwargs = NETWORKS[name]()
    recipe = {"preset": bits, "dynamic": OPEN[name]}
    names = ", ".join(next(iter(OPEN[name].values())))
    try:
        program = build_program(model.eval(), args, recipe, example_kwargs=kwargs)
        calibrate(program.student, [program.example], method="minmax")
        lowered = lower(program.student).graph_module
        path = export(program, lowered, folder / "model.onnx").path
    except SqakdError as refused:
        return [name, names, f"refused: {refused}", ""]
    calls = calls_of_other_sizes(program.student, program.example, program.free_axes)
    checked = validate(program.student, lowered, path, [program.example, *calls])
    codes = [tensor for run in checked.runtimes for tensor in run.tensors]
    off = sum(tensor.share_above(0) * tensor.elements for tensor in codes)
    said = (
        checked.failures[0]
        if checked.failures
        else f"{off:.0f} of {sum(t.elements for t in codes)}"
    )
    return [name, names, str(1 + len(calls)), said]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bits", default="w8a8")
    parser.add_argument("--networks", nargs="+", default=list(OPEN), choices=list(OPEN))
    options = parser.parse_args()
    print("| network | free | sizes | codes off |\n|---|---|---|---|")
    for name in options.networks:
        with tempfile.TemporaryDirectory() as folder:
            print(f"| {' | '.join(row(name, options.bits, Path(folder)))} |", flush=True)


if __name__ == "__main__":
    main()
