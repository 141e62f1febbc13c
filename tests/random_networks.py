"""Random networks from a number, and whether all stages of the compiler agree on one."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import onnx
import torch
from other_forms import evaluated, run, with_encodings_applied
from torch import Tensor, nn
from torch.nn import functional as F

from sqakd_fx.exporters.profiles import PROFILES
from sqakd_fx.ir import meta
from sqakd_fx.ir.outputs import largest_difference, tensors_of
from sqakd_fx.ir.pass_manager import run_passes
from sqakd_fx.passes.fold_batch_norm import FoldBatchNorm
from sqakd_fx.program import Program, build_program, lower
from sqakd_fx.quant.batch_norm import ChannelAffine
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.recipe.resolution import resolve_recipe
from sqakd_fx.results.export import export
from sqakd_fx.targets import TARGETS
from sqakd_fx.validation.validate import validate

Step = tuple[str, int, int]
"""What to do, on which earlier value, and with which other one (both counted from the latest)."""


@dataclass(frozen=True)
class Case:
    """A random network and how it is quantized."""

    plan: tuple[Step, ...]
    channels: int
    size: int
    bits: str
    batch_norm: str
    profile: str
    float_every: int
    seed: int
    target: str = ""


def random_case(seed: int) -> Case:
    """The network of a number."""
    draw = random.Random(seed)
    names = [*LAYERS, *MOVES, *VALUES, *PAIRS]
    plan = [
        (draw.choice(names), draw.choice((0, 0, 1, 2, 3)), draw.randrange(4))
        for _ in range(draw.randint(1, 9))
    ]
    return Case(
        tuple(plan),
        channels=draw.randint(1, 4),
        size=draw.choice([5, 6, 9]),
        bits=f"w{draw.randint(1, 8)}a{draw.randint(1, 8)}",
        batch_norm=draw.choice(["absorb", "fold"]),
        profile=draw.choice(["container", "packed"]),
        float_every=draw.choice([0, 0, 2, 3]),
        seed=seed,
    )


def _normed(c: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(c, 4, 1, bias=False), nn.BatchNorm2d(4))


LAYERS: dict[str, Callable[[int, int], nn.Module]] = {
    "conv": lambda c, i: nn.Conv2d(c, 5, 3, stride=1 + i % 2, padding=1),
    "depthwise": lambda c, i: nn.Conv2d(c, c, 3, padding=2, dilation=2, groups=c, bias=False),
    "multiplied": lambda c, i: nn.Conv2d(c, 2 * c, 3, padding="same", groups=c),
    "grouped": lambda c, i: nn.Conv2d(c, 4, (1, 3), padding=(0, 1), groups=2 - c % 2),
    "dilated": lambda c, i: nn.Conv2d(c, 3, 3, padding=3, dilation=3, padding_mode="circular"),
    "reflected": lambda c, i: nn.Conv2d(c, 3, 3, padding=1, padding_mode="reflect"),
    "pointwise": lambda c, i: _normed(c),
    "norm": lambda c, i: nn.BatchNorm2d(c),
    "group_norm": lambda c, i: nn.GroupNorm(1 if c % 2 else 2, c),
    "prelu": lambda c, i: nn.PReLU(c),
}
"""Layers of so many channels at a place in the plan, for maps of any size above 3."""

GROWING: dict[str, Callable[[int, int], nn.Module]] = {
    "transpose_conv": lambda c, i: nn.ConvTranspose2d(c, 3, 2, stride=2),
    "transpose_wide": lambda c, i: nn.ConvTranspose2d(
        c, 2 * c, 3, stride=2, padding=1, output_padding=1, groups=c
    ),
    "transpose_dilated": lambda c, i: nn.ConvTranspose2d(c, 2, (2, 3), dilation=2, bias=False),
}
"""Layers that make maps larger, for small ones."""


def _in_place(a: Tensor) -> Tensor:
    y = a.clone()
    y[:, :1] += 0.5
    return y.clamp_(-3, 3)


def _centred(a: Tensor) -> Tensor:
    parts = (a - a.mean(1, keepdim=True)).chunk(2, 1)
    return parts[0]


def _by_size(a: Tensor) -> Tensor:
    high = a.shape[2]
    top, bottom = torch.split(a, [1, high - 1], 2)
    return torch.cat([bottom, top], 2)


MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "max_pool": lambda a: F.max_pool2d(a, 3, stride=1, padding=1),
    "pad": lambda a: F.pad(a, (1, 0, 0, 1)),
    "shuffle": lambda a: a.flip(1).transpose(2, 3),
    "swapped": lambda a: torch.cat(a.chunk(2, 1)[::-1], 1),
    "by_size": _by_size,
    "stacked": lambda a: torch.stack(a.unbind(2)[::-1], 2),
    "half": lambda a: a.chunk(2, dim=1)[0] if a.shape[1] > 1 else a * 0.5,
    "roll": lambda a: torch.roll(a, (1, -1), dims=(1, 3)),
    "upsample": lambda a: (
        F.interpolate(a, scale_factor=2, mode="nearest") if a.shape[2] < 12 else a
    ),
    "pixel_shuffle": lambda a: (
        F.pixel_shuffle(a, 2) if a.shape[1] % 4 == 0 and a.shape[2] < 12 else a
    ),
}
"""What moves values."""

VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
    "avg_pool": lambda a: F.avg_pool2d(a, 2, ceil_mode=True) if a.shape[2] > 4 else a,
    "scaled": lambda a: a / (1 + a.abs().mean(dim=(2, 3), keepdim=True)),
    "where": lambda a: torch.where(a > 0, a, 0.1 * a),
    "centred": _centred,
    "in_place": _in_place,
}
"""What computes from one value."""

PAIRS = ("add", "mul", "cat", "sub", "maximum", "attention", "shared", "weighted", "linear_last", "gru",
         *GROWING)  # fmt: skip


class RandomNet(nn.Module):
    """Runs a list of steps over (N, C, H, W) values; sizes are brought together where two values meet."""

    def __init__(self, plan: Sequence[Step], channels: int, size: int) -> None:
        super().__init__()
        self.plan = plan
        self.shared = nn.Conv2d(channels, channels, 3, padding=1)
        self.layers = nn.ModuleDict()
        self.head = nn.LazyLinear(3)
        self(torch.zeros(2, channels, size, size))
        self.eval()

    def layer(self, index: int, make: Any) -> nn.Module:
        key = str(index)
        if key not in self.layers:
            self.layers[key] = make()
        return self.layers[key]

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for index, (what, first, second) in enumerate(self.plan):
            a = values[-1 - first % len(values)]
            b = values[-1 - second % len(values)]
            values.append(self.step(index, what, a, b))
        y = values[-1]
        return self.head(torch.flatten(F.adaptive_avg_pool2d(y, 1), 1))

    def step(self, index: int, what: str, a: Tensor, b: Tensor) -> Tensor:
        c = a.shape[1]
        if what in LAYERS:
            return self.layer(index, lambda: LAYERS[what](c, index))(a)
        if what in GROWING:
            small = a.shape[2] < 12
            return self.layer(index, lambda: GROWING[what](c, index))(a) if small else a
        if what in MOVES or what in VALUES:
            return (MOVES | VALUES)[what](a)
        if what == "shared":
            return self.shared(a) if c == self.shared.in_channels else torch.relu(a)
        if what == "linear_last":
            y = self.layer(index, lambda: nn.Linear(c, 6))(a.permute(0, 2, 3, 1))
            return y.permute(0, 3, 1, 2)
        if what == "weighted":
            layer = self.layer(index, lambda: nn.Conv2d(c, 4, 1))
            return F.conv2d(a, layer.weight * 2, layer.bias)
        if what == "gru":
            layer = self.layer(index, lambda: nn.GRU(c, 2, 2, bidirectional=True, batch_first=True))
            y, state = layer(a.mean(3).transpose(1, 2))
            return (y.transpose(1, 2) + state.mean(0).repeat(1, 2)[..., None])[..., None] + a[:, :1]
        return self.meet(what, *_same_size(a, b))

    def meet(self, what: str, a: Tensor, b: Tensor) -> Tensor:
        if what == "cat":
            return torch.cat([a, b], dim=1)
        if what == "attention":
            q, k = a.flatten(2).transpose(1, 2), b.flatten(2)
            wide = min(q.shape[2], k.shape[1])
            weights = torch.softmax(q[:, :, :wide] @ k[:, :wide] / wide**0.5, dim=-1)
            return (weights @ q).transpose(1, 2).reshape(a.shape)
        wide = min(a.shape[1], b.shape[1])
        function = {"add": torch.add, "mul": torch.mul, "sub": torch.sub, "maximum": torch.maximum}
        return function[what](a[:, :wide], b[:, :wide])


def _same_size(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    high, wide = min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3])
    return a[:, :, :high, :wide], b[:, :, :high, :wide]


def kept_in_float(model: nn.Module, images: Tensor, every: int) -> list[dict[str, Any]]:
    """Overrides that leave every so many layers in float; none for 0."""
    if not every:
        return []
    student = build_program(model, images, resolve_recipe("w4a4")).student
    layers = [node.name for node in student.graph.nodes if meta.layer(node) is not None]
    return [{"match": name, "float": True} for name in layers[1::every]]


@dataclass(frozen=True)
class Compiled:
    """A random network with the inputs that it was calibrated on, and what the graphs before differ in."""

    program: Program
    lowered: torch.fx.GraphModule
    images: Tensor
    differences: tuple[str, ...]


def compiled(case: Case) -> Compiled:
    """Traced, folded, quantized and lowered."""
    torch.manual_seed(case.seed)
    model = RandomNet(case.plan, case.channels, case.size)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
    images = torch.randn(4, case.channels, case.size, case.size)
    with torch.no_grad():
        wanted = tensors_of(model(images))
    kept = kept_in_float(model, images, case.float_every)
    settings = [f"target={case.target}" if case.target else f"profile={case.profile}"]
    recipe = resolve_recipe(case.bits, batch_norm=case.batch_norm, override=kept, settings=settings)
    program = build_program(model, images, recipe)
    folded = run_passes(program.teacher, [FoldBatchNorm()]).graph_module
    with torch.no_grad():
        off = largest_difference(wanted, tensors_of(program.student(images)))
        off_folded = largest_difference(wanted, tensors_of(folded(images)))
    found = [f"the traced graph is off by {off:.1g}"] if not off <= 1e-5 else []
    found += [f"the folded graph is off by {off_folded:.1g}"] if not off_folded <= 1e-4 else []
    calibrate(program.student, [(images,)], method="minmax")
    for module in program.student.modules():
        if isinstance(module, ChannelAffine):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return Compiled(program, lower(program.student).graph_module, images, tuple(found))


def wrong_of(case: Case) -> list[str]:
    """What does not agree between the stages: traced, folded, quantized, lowered, exported and run."""
    made = compiled(case)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export(made.program, made.lowered, path)
        checked = validate(made.program.student, made.lowered, path, [(made.images,)])
    # of 4 samples, some predictions are ties
    return [*made.differences, *(f for f in checked.failures if "predictions" not in f)]


def _run_program(path: Path, images: Tensor) -> Tensor:
    return cast(Tensor, torch.export.load(path).module()(images))


def _run_encodings(path: Path, images: Tensor) -> Tensor:
    encodings = json.loads(path.with_suffix(".encodings").read_text("utf-8"))
    return torch.from_numpy(run(with_encodings_applied(onnx.load(path), encodings), [images]))


def _run_qonnx(path: Path, images: Tensor) -> Tensor:
    return torch.from_numpy(evaluated(onnx.load(path), images.numpy()))


RUNS: dict[str, Callable[[Path, Tensor], Tensor]] = {
    "executorch": _run_program,
    "litert": _run_program,
    "qnn": _run_encodings,
    "qonnx": _run_qonnx,
}
"""How the file of a target that any result is exported for is computed."""


def wrong_of_other(case: Case, target: str) -> list[str]:
    """What the file of a target computes otherwise than the integer program.

    Their sums are floats: a code that lies on a tie may fall to the other side, and what follows with it.
    """
    made = compiled(case)
    images = torch.cat([made.images, torch.randn(28, *made.images.shape[1:])])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"model{Path(PROFILES[str(TARGETS[target].profile)][0]).suffix}"
        export(made.program, made.lowered, path, target=target)
        with torch.no_grad():
            got, wanted = RUNS[target](path, images), made.lowered(images)
    scale = float(wanted.std())
    apart = (got - wanted).abs().amax(1) / scale
    share = float((apart > 0.01).float().mean())
    off = float(apart.square().mean().sqrt())
    wrong = got.shape != wanted.shape or not (share <= 0.1 or off <= 0.05)
    about = (
        f"{share:.0%} of the samples differ from the integer program, by {off:.2f} of a deviation"
    )
    return [*made.differences, *([about] if wrong else [])]
