"""Whole networks in OpenVINO, with its low-precision passes and without, beside ONNX Runtime: one table.

    pip install openvino
    PYTHONPATH=tests python benchmarks/on_openvino.py [--networks NAME …]

Networks of the tests, calibrated, at W8A8 as `container` and at W4A4 as `packed`. The error is that of the outputs,
relative to ONNX Runtime's.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from default_sessions import NETWORKS
from torch import Tensor

from sqakd_fx.errors import SqakdError
from sqakd_fx.program import build_program, lower
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.results.export import export
from sqakd_fx.runtime.openvino import OpenVinoModel
from sqakd_fx.runtime.session import session

FORMS = (("w8a8", "container"), ("w4a4", "packed"))
HEAD = ("network", "bits", "profile", "passes on: error", "same predictions", "passes off: error")


def compared(name: str, bits: str, profile: str, folder: Path) -> tuple[str, str, str]:
    """The last three cells of a row."""
    torch.manual_seed(0)
    model, inputs = NETWORKS[name]()
    recipe = {"preset": bits, "target": "openvino", "profile": profile}
    program = build_program(model.eval(), inputs, recipe)
    flat = program.traced.call.flatten(inputs, {})
    calibrate(program.student, [flat])
    path = export(program, lower(program.student).graph_module, folder / "model.onnx").path
    running = session(path)
    tensors = [x.numpy() for x in flat if isinstance(x, Tensor)]
    feeds = dict(zip((i.name for i in running.get_inputs()), tensors, strict=True))
    wanted = running.run(None, feeds)
    with_passes, without = (
        OpenVinoModel(path, low_precision=on)(None, feeds) for on in (True, False)
    )
    same = np.mean(_classes(with_passes[0]) == _classes(wanted[0]))
    return _error(with_passes, wanted), f"{same:.2%}", _error(without, wanted)


def _classes(output: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.asarray(output.reshape(len(output), -1).argmax(1))


def _error(found: list[Any], wanted: list[Any]) -> str:
    pairs = zip(found, wanted, strict=True)
    return f"{max(np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in pairs):.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    for name in parser.parse_args().networks:
        for bits, profile in FORMS:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    cells = compared(name, bits, profile, Path(folder))
                except SqakdError as error:
                    cells = (f"refused: {error}", "", "")
            print(f"| {' | '.join((name, bits, profile, *cells))} |", flush=True)


if __name__ == "__main__":
    main()
