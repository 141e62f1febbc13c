"""NNCF's post-training quantization of a float ONNX file, with its default settings.

python benchmarks/pretrained_nncf.py FOLDER INTO: calibrates with FOLDER/calibration.npz.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nncf
import onnx
from pretrained_files import load, session


def main() -> None:
    folder, into = map(Path, sys.argv[1:])
    whole = onnx.load(folder / "float.onnx")
    calibration = load(folder / "calibration.npz")
    names = [given.name for given in session(folder / "float.onnx").get_inputs()]
    rows = [
        {name: value[at : at + 1] for name, value in zip(names, calibration, strict=True)}
        for at in range(len(calibration[0]))
    ]
    transformer = any(node.op_type == "LayerNormalization" for node in whole.graph.node)
    quantized = nncf.quantize(
        whole,
        nncf.Dataset(rows),
        subset_size=len(rows),
        model_type=nncf.ModelType.TRANSFORMER if transformer else None,
    )
    onnx.save(quantized, into)


if __name__ == "__main__":
    main()
