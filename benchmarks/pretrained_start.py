"""How far a calibrated W8A8 student of a trained network is from float before training: one line for each start.

    python benchmarks/pretrained_start.py NETWORK [--environments FOLDER]

Errors are relative, of each output, on samples that calibration did not see: of all quantizers, and of weights alone.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from pretrained_environments import default_folder, names, python_of
from pretrained_files import network
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from sqakd_fx.program import build_program
from sqakd_fx.quant.quantizer import quantizers_of
from sqakd_fx.recipe.resolution import resolve_recipe
from sqakd_fx.stages import calibrate

_NEAREST = {"rounding": "nearest", "weight_range": "reduced"}
STARTS: dict[str, dict[str, Any]] = {
    "mse, biases as they are": {**_NEAREST, "initialization": "mse", "bias_correction": False},
    "output, biases corrected": _NEAREST,
    "weights in pairs": {"rounding": "nearest"},
    "rounding compensated (W8A8)": {},
}
"""Each but the first has what the one in front of it has."""
_CALIBRATED, _HELD_OUT = 8, 4
"""Batches."""


def outputs_of(model: nn.Module, batches: Sequence[tuple[Any, ...]]) -> list[Tensor]:
    """Each floating-point output over all batches, flat."""
    with torch.no_grad():
        found = [
            [x for x in tree_leaves(model(*batch)) if x.is_floating_point()] for batch in batches
        ]
    return [torch.cat([x.flatten() for x in one]) for one in zip(*found, strict=True)]


def errors(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> str:
    pairs = zip(got, wanted, strict=True)
    return " ".join(f"{float((a - b).norm() / b.norm()):.4f}" for a, b in pairs)


def with_roles(student: fx.GraphModule, roles: Iterable[str]) -> fx.GraphModule:
    """The student with the quantizers of these roles alone."""
    for quantizer in quantizers_of(student).values():
        quantizer.enabled = quantizer.role in roles
    return student


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("network", choices=names())
    parser.add_argument("--environments", type=Path, default=default_folder())
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.inside:
        python = str(python_of(options.network, options.environments))
        os.execv(python, [python, *sys.argv, "--inside"])
    module = network(options.network)
    model = module.model().eval()
    train = list(itertools.islice(iter(module.train_data()), _CALIBRATED))
    pairs = module.eval_data() if hasattr(module, "eval_data") else None
    held_out = module.held_out() if pairs is None else (x for x, _ in pairs)
    batches = list(itertools.islice(iter(held_out), _HELD_OUT))
    for label, settings in STARTS.items():
        program = build_program(
            model, module.example_inputs(), resolve_recipe("w8a8").model_copy(update=settings)
        )
        calibrate(program, train)
        inputs = [program.inputs(batch) for batch in batches]
        wanted = outputs_of(program.teacher, inputs)
        student = program.student.eval()
        both = errors(outputs_of(with_roles(student, ("weight", "activation")), inputs), wanted)
        alone = errors(outputs_of(with_roles(student, ("weight",)), inputs), wanted)
        print(f"{options.network} | {label} | all {both} | weights alone {alone}", flush=True)


if __name__ == "__main__":
    main()
