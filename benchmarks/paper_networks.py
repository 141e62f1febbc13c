"""The paper's networks with every family, through the whole pipeline on a few steps of random images.

    python benchmarks/paper_networks.py [NETWORK ...]

One row a network, one column a family: the ONNX file's agreement with the trained graph, or what went
wrong. Weights are random, so this says that everything runs and is exact, nothing about accuracy.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
import warnings
from pathlib import Path

from sqakd_fx.errors import SqakdError
from sqakd_fx.pipeline import run
from sqakd_fx.quant.families import FAMILIES
from sqakd_fx.recipe.resolution import resolve_recipe
from sqakd_fx.source.source import load_source

PAPER = Path(__file__).parent.parent / "examples" / "paper"
NETWORKS = (
    "resnet20",
    "resnet32",
    "vgg8",
    "vgg13",
    "resnet18",
    "vgg11",
    "mobilenetv2",
    "shufflenetv2",
    "squeezenet",
)


def cell(network: str, family: str, bits: int = 4) -> str:
    """What came of one network with one family for weights and activations."""
    recipe = resolve_recipe(
        f"paper/lsq-w{bits}a{bits}",
        weight_family=family,
        activation_family=family,
        steps=2,
        batch_size=4,
        calibration_batches=2,
    )
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
            result = run(load_source(str(PAPER / f"{network}.py")), recipe, Path(folder) / "out")
    except SqakdError as error:
        return f"{type(error).__name__}: {error}"
    assert result is not None
    if result.validation.failures:
        return "; ".join(result.validation.failures)
    return f"{min(r.agreement for r in result.validation.runtimes):.0%}"


def main() -> None:
    warnings.simplefilter("ignore")
    networks = sys.argv[1:] or NETWORKS
    print("| network | " + " | ".join(FAMILIES) + " |")
    print("|---" * (len(FAMILIES) + 1) + "|")
    for network in networks:
        print(f"| {network} |", end="", flush=True)
        for family in FAMILIES:
            print(f" {cell(network, family)} |", end="", flush=True)
        print()


if __name__ == "__main__":
    main()
