"""Every network of the tests at W8A8, W4A4, W2A2 and W1A1, as `container` and `packed`: is the file exact?

    python benchmarks/contract.py [GLOB ...] [--random N] [--bits BITS] [--profile PROFILE] [--table FILE]

Held at every quantized tensor, one operation at a time, against the integer program in PyTorch: the trained graph and
ONNX Runtime at full optimization (within 1 step in 99.9 % of the codes of each tensor, within 2 everywhere),
optimization off (within 1 everywhere), and what of the program's convolutions, products and sums has no integer kernel
in the runtime's own optimized graph. Exit status 1 where one of them does not hold. Weights are random, with BatchNorm
statistics of the example.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from any_model import versions
from chosen import chosen
from torch import nn

from sqakd_fx.program import build_program, lower
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.recipe.resolution import resolve_recipe
from sqakd_fx.results.export import export_job
from sqakd_fx.runtime.fusion import without_kernel
from sqakd_fx.source.source import load_source
from sqakd_fx.validation.parity import TensorParity
from sqakd_fx.validation.validate import validate
from sqakd_fx.validation.verdict import departs_from_training

BITS = ("w8a8", "w4a4", "w2a2", "w1a1")
PROFILES = ("container", "packed")
Network = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """One network at some bits in one profile.

    `unequal` and `beyond_one` are the largest shares of one tensor's codes that are off at all and by more
    than a step at full optimization; `worst` says of which tensor and operator. `trained` is of the trained
    graph against the program, `departs` where it is another function.
    """

    name: str
    bits: str
    profile: str
    tensors: int
    codes: int
    unequal: float
    beyond_one: float
    steps: int
    worst: str
    steps_off: int
    in_float: dict[str, int]
    agreement: float
    trained: str
    departs: bool

    @property
    def holds(self) -> bool:
        exact = self.beyond_one <= 1e-3 and self.steps <= 2 and self.steps_off <= 1
        return exact and not self.in_float and not self.departs


def networks(random: int) -> dict[str, Callable[[], Network]]:
    """The networks of tests/ and examples/ by name, and the first `random` networks of a fixed draw."""
    tests = Path(__file__).parents[1] / "tests"
    sys.path[:0] = [str(tests), str(tests / "pipeline")]
    from awkward_models import AWKWARD
    from common_models import MODELS
    from conftest import EXAMPLE, ResidualNet, with_lively_batch_norm
    from test_paper import NETWORKS, PAPER, lively

    def residual() -> Network:
        x = torch.randn(16, 3, 16, 16)
        return with_lively_batch_norm(ResidualNet(), tuple(x.shape)), (x,), {}

    def fashion() -> Network:
        source = load_source(str(EXAMPLE))
        images, _ = next(iter(source.eval_data or ()))
        return source.model.eval(), (images[:64],), {}

    def paper(name: str) -> Network:
        source = load_source(str(PAPER / f"{name}.py"))
        (example,) = source.example_inputs
        images = torch.randn(4, *example.shape[1:])
        return lively(source.model, images), (images,), {}

    found: dict[str, Callable[[], Network]] = {"residual": residual, "fashion": fashion}
    for name, (make, args, kwargs, _) in MODELS.items():
        found[name] = lambda m=make, a=args, k=kwargs: (m().eval(), a, k)  # type: ignore[misc]
    for name, (make, x) in AWKWARD.items():
        found[name] = lambda m=make, x=x: (m().eval(), (x,), {})  # type: ignore[misc]
    for name in NETWORKS:
        found[f"paper/{name}"] = lambda n=name: paper(n)  # type: ignore[misc]
    for number in range(random):
        found[f"random/{number}"] = lambda n=number: _random_network(n)  # type: ignore[misc]
    return found


def _random_network(number: int) -> Network:
    from random_networks import RandomNet, random_case

    case = random_case(number)
    torch.manual_seed(case.seed)
    images = torch.randn(8, case.channels, case.size, case.size)
    return RandomNet(case.plan, case.channels, case.size), (images,), {}


def rows(name: str, make: Callable[[], Network], bits: str, profiles: Sequence[str]) -> list[Row]:
    """The network's row for each profile."""
    from sqakd_fx.exporters.profiles import write_profile

    torch.manual_seed(0)
    model, args, kwargs = make()
    recipe = resolve_recipe(bits)
    program = build_program(model, args, recipe, example_kwargs=kwargs)
    example = program.traced.call.flatten(args, kwargs)
    calibrate(program.student, [example], method="minmax")
    lowered = lower(program.student).graph_module
    job = export_job(lowered, program)
    found = []
    for profile in profiles:
        with tempfile.TemporaryDirectory() as folder:
            path = write_profile(profile, job, Path(folder) / "model.onnx").path
            checked = validate(program.student, lowered, path, [example])
        full = [t for r in checked.runtimes if r.optimization == "full" for t in r.tensors]
        off = [t for r in checked.runtimes if r.optimization == "off" for t in r.tensors]
        found.append(
            Row(
                name,
                bits,
                profile,
                len(full),
                sum(t.elements for t in full),
                max((t.share_above(0) for t in full), default=0.0),
                max((t.share_above(1) for t in full), default=0.0),
                max((t.largest for t in full), default=0),
                _worst(full),
                max((t.largest for t in off), default=0),
                without_kernel(lowered, checked.fusion),
                checked.student_agreement,
                _trained(checked.trained),
                any(map(departs_from_training, checked.trained)),
            )
        )
    return found


def _worst(tensors: Sequence[TensorParity]) -> str:
    """The tensor that is furthest off, and the operator that made it."""
    found = max(tensors, key=lambda t: (t.largest, t.share_above(0)), default=None)
    return "" if found is None or not found.largest else f"{found.name} ({found.producer})"


def _trained(tensors: Sequence[TensorParity]) -> str:
    """The largest share of one tensor's codes that differ, the most steps, and where."""
    if not any(t.largest for t in tensors):
        return f"all {len(tensors)} equal"
    share = max(t.share_above(0) for t in tensors)
    return f"{share:.3%}, {max(t.largest for t in tensors)}, {_worst(tensors)}"


def line(row: Row) -> str:
    """A row of the table."""
    cells = (
        row.name,
        row.bits,
        row.profile,
        row.tensors,
        row.codes,
        f"{row.unequal:.3%}",
        f"{row.beyond_one:.3%}",
        row.steps,
        row.worst,
        row.steps_off,
        ", ".join(f"{n} {what}" for what, n in row.in_float.items()) or "none",
        f"{row.agreement:.1%}",
        row.trained,
        "yes" if row.holds else "NO",
    )
    return f"| {' | '.join(map(str, cells))} |"


HEAD = (
    "| network | bits | profile | tensors | codes | full: off at all | by > 1 step | most steps | where "
    "| optimization off: most steps | in float | trained graph agrees "
    "| trained graph: off at all, most steps | holds |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("globs", nargs="*", default=["*"])
    parser.add_argument("--random", type=int, default=20, help="random networks")
    parser.add_argument("--bits", choices=BITS, action="append")
    parser.add_argument("--profile", choices=PROFILES, action="append")
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    started = time.perf_counter()
    print(f"{versions()}\n\n{HEAD}", flush=True)
    found: list[Row] = []
    errors: list[str] = []
    tried = networks(options.random)
    for name in chosen(tried, options.globs):
        make = tried[name]
        for bits in options.bits or BITS:
            try:
                made = rows(name, make, bits, options.profile or PROFILES)
            except Exception as error:
                errors.append(f"{name} at {bits}: {type(error).__name__}: {error}")
                print(f"| {errors[-1]} |", flush=True)
                continue
            found += made
            print("\n".join(map(line, made)), flush=True)
    held = sum(row.holds for row in found)
    seconds = time.perf_counter() - started
    print(f"\n{held} of {len(found) + len(errors)} hold; {seconds:.0f} s")
    if options.table:
        text = "\n".join([HEAD, *map(line, found), *errors])
        options.table.write_text(f"{versions()}\n\n{text}\n")
    raise SystemExit(held < len(found) or bool(errors))


if __name__ == "__main__":
    main()
