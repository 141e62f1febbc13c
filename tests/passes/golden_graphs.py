"""Printed graphs of known networks at every stage, and hashes of them that are committed beside this file.

    PYTHONPATH=tests python tests/passes/golden_graphs.py --rewrite         where a change of graphs is intended
    PYTHONPATH=tests python tests/passes/golden_graphs.py --print FOLDER    every printed graph, to compare checkouts

What is printed depends on no weight and on no machine: operations, arguments, shapes and bits. Ranges of activations
are the same for all tensors, so that clips become the same codes everywhere.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from awkward_models import Cells, Mixed, Norms
from common_models import IMAGE, ROWS, TOKENS, ByHand, Functional, Shared, UNet
from conftest import ResidualNet
from torch import Tensor, fx, nn

from sqakd_fx.frontend.copy_model import float_copy
from sqakd_fx.frontend.trace import trace
from sqakd_fx.ir.pass_manager import Pass, run_passes
from sqakd_fx.passes.propagate_shapes import PropagateShapes
from sqakd_fx.program import build_program, lower
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.quant.quantizer import Quantizer
from sqakd_fx.recipe.resolution import resolve_recipe

HASHES = Path(__file__).with_suffix(".json")
EXAMPLES = Path(__file__).parent.parent.parent / "examples"


class Spelt(nn.Module):
    """A hard-swish and a GELU as importers spell them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = (x * (nn.functional.relu6(x + 3) / 6)).mean((2, 3))
        return self.head(0.5 * x * (1 + torch.erf(x / 2**0.5)))


class Depthwise(nn.Module):
    """Inverted residual blocks with ReLU6."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()
        )
        self.block = nn.Sequential(
            nn.Conv2d(8, 16, 1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU6(),
            nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU6(),
            nn.Conv2d(16, 8, 1, bias=False),
            nn.BatchNorm2d(8),
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.block(x)
        return self.head(x.mean((2, 3)))


class Router(nn.Module):
    """Each token takes the two best of four experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(16, 4), nn.Linear(16, 4 * 8)

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).topk(2)
        answers = self.experts(x).unflatten(-1, (4, 8))
        picked = answers.gather(2, chosen.unsqueeze(-1).expand(-1, -1, -1, 8))
        return (weights.softmax(-1).unsqueeze(-1) * picked).sum(2)


class LayerScale(nn.Module):
    """A residual branch with a factor of each channel at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 3, 1))
        self.gamma = nn.Parameter(torch.full((3, 1, 1), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.branch(x)


class LearnedAffine(nn.Module):
    """One factor and one summand for all channels, behind a layer and behind an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Linear(8, 5)
        self.a, self.b = nn.Parameter(torch.tensor([1.5])), nn.Parameter(torch.tensor([0.25]))

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            x = self.a * nn.functional.hardswish(self.a * layer(x) + self.b) + self.b
        return self.head(x.mean((2, 3)) / 4)


def _fashion() -> nn.Module:
    folder = str(EXAMPLES / "fashion")
    sys.path.insert(0, folder)
    try:
        from network import FashionNet
    finally:
        sys.path.remove(folder)
    return FashionNet()


def _encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, activation="gelu", batch_first=True)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor, str]] = {
    "residual": (ResidualNet, torch.zeros(2, 3, 16, 16), "absorb"),
    "fashion": (_fashion, torch.zeros(2, 1, 28, 28), "fold"),
    "transformer encoder": (_encoder, TOKENS, "absorb"),
    "depthwise": (Depthwise, IMAGE, "absorb"),
    "router": (Router, TOKENS, "absorb"),
    "layer scale": (LayerScale, IMAGE, "absorb"),
    "learned affine": (LearnedAffine, IMAGE, "absorb"),
    "attention by hand": (ByHand, TOKENS, "absorb"),
    "functional": (Functional, IMAGE, "fold"),
    "shared": (Shared, ROWS, "absorb"),
    "u-net": (UNet, IMAGE, "absorb"),
    "mixed": (Mixed, IMAGE, "absorb"),
    "norms": (Norms, IMAGE, "fold"),
    "cells": (Cells, TOKENS, "absorb"),
    "spelt activations": (Spelt, IMAGE, "absorb"),
}
"""By name: what makes the network, one call's input, and what becomes of BatchNorm."""


def stages(name: str) -> dict[str, str]:
    """The printed graph of a network as traced and behind every pass, in order."""
    make, x, batch_norm = NETWORKS[name]
    torch.manual_seed(0)
    model = make().eval()
    found = {"traced": printed(trace(float_copy(model), (x,)).graph_module)}

    def keep(one: Pass, graph_module: fx.GraphModule) -> None:
        again = sum(stage.startswith(one.name) for stage in found)
        found[f"{one.name} {again + 1}" if again else one.name] = printed(graph_module)

    recipe = resolve_recipe("w4a4", batch_norm=batch_norm)
    program = build_program(model, (x,), recipe, after=keep)
    calibrate(program.student, [program.example], method="minmax")
    for module in program.student.modules():
        if isinstance(module, Quantizer) and module.role == "activation":
            module.initialize(torch.linspace(-3, 12, 16), "minmax")
    lowered = lower(program.student).graph_module
    run_passes(lowered, [PropagateShapes(program.example)])
    found["lower_to_integer"] = printed(lowered)
    return found


def printed(graph_module: fx.GraphModule) -> str:
    """One line a node: its name, what it calls on what, and the shape of what it gives."""
    modules = dict(graph_module.named_modules())
    return "".join(f"{_line(node, modules)}\n" for node in graph_module.graph.nodes)


def _line(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    target = node.target if isinstance(node.target, str) else _name(node.target)
    kwargs = {key: value for key, value in sorted(node.kwargs.items()) if value is not None}
    given = [_value(a) for a in node.args] + [f"{k}={_value(v)}" for k, v in kwargs.items()]
    called = f" ({_kind(modules[target])})" if node.op == "call_module" else ""
    meta = node.meta.get("tensor_meta")
    shape = getattr(meta, "shape", None)
    gives = "" if shape is None else f" -> {tuple(shape)} {meta.dtype}"
    return f"{node.name} = {node.op} {target}({', '.join(given)}){called}{gives}"


def _name(called: Any) -> str:
    return str(called) if isinstance(called, torch._ops.OpOverload) else called.__name__


def _kind(module: nn.Module) -> str:
    return module.extra_repr() if isinstance(module, Quantizer) else type(module).__name__


def _value(value: Any) -> str:
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, slice):
        return f"slice({_value(value.start)}, {_value(value.stop)}, {_value(value.step)})"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_value(one)}' for key, one in value.items())}}}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, bool | int | str | torch.dtype | torch.device) or value is None:
        return repr(value)
    return getattr(value, "__name__", type(value).__name__)


def hashes(graphs: dict[str, str]) -> dict[str, str]:
    """The start of the SHA-256 of each printed graph."""
    return {stage: hashlib.sha256(text.encode()).hexdigest()[:16] for stage, text in graphs.items()}


def main() -> None:
    """Rewrite the committed hashes, or print the graphs into a folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--rewrite", action="store_true", help=f"write {HASHES.name} again")
    action.add_argument("--print", type=Path, metavar="FOLDER", help="a file a network and stage")
    options = parser.parse_args()
    graphs = {name: stages(name) for name in NETWORKS}
    if options.rewrite:
        known = {name: hashes(by_stage) for name, by_stage in graphs.items()}
        HASHES.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
        return
    for name, by_stage in graphs.items():
        for position, (stage, text) in enumerate(by_stage.items()):
            path = options.print / name / f"{position:02d} {stage}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
