"""Every public module and function of torch.nn, in several forms, from trace to ONNX Runtime.

    python benchmarks/torch_nn.py [GLOB ...] [--docs FILE]

Each call stands between two 8-bit layers. The calls of one name go through together, and one by one where that
fails. A call is exact, or refused by an error or a note that names it; everything else is wrong, and exit code 1.
"""

from __future__ import annotations

import argparse
import itertools
import re
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from chosen import chosen
from torch import Tensor, nn
from torch_nn_cases import INPUTS, LEFT_OUT, Case, all_cases

from sqakd_fx.errors import SqakdError
from sqakd_fx.ir.outputs import largest_difference, tensors_of
from sqakd_fx.program import build_program, lower
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.recipe.resolution import resolve_recipe
from sqakd_fx.results.export import export
from sqakd_fx.validation.validate import validate

_LAYERS = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


@dataclass(frozen=True)
class Outcome:
    """How a call came through: `exact`, `refused` or `wrong`, and what was said."""

    case: Case
    result: str
    reason: str = ""


def _layer(x: Tensor, width: int) -> nn.Module:
    """A quantized layer over axis 1; what no layer takes stays as it is."""
    quantizable = x.is_floating_point() and x.ndim in _LAYERS and len(x) == 4
    if not quantizable:
        return nn.Identity()
    kernel = () if x.ndim == 2 else (1,)
    return _LAYERS[x.ndim](x.shape[1], width, *kernel)


class Between(nn.Module):
    """Calls, each between two layers of its own."""

    def __init__(self, cases: Sequence[Case], inputs: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.before, self.calls, self.behind = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        self.made: list[Any] = []  # of each call on the example
        for case in cases:
            self.before.append(nn.ModuleList(_layer(x, x.shape[1]) for x in inputs))
            self.calls.append(case.make().eval())
            with torch.no_grad():
                given = [f(x) for f, x in zip(self.before[-1], inputs, strict=True)]
                self.made.append(self.calls[-1](*given))
            self.behind.append(_layer(_parts(self.made[-1], self.made[-1])[0], 3))

    def forward(self, x: Tensor, y: Tensor | None = None) -> list[Tensor]:
        outputs = []
        inputs = (x,) if y is None else (x, y)
        calls = zip(self.before, self.calls, self.behind, self.made, strict=True)
        for before, call, behind, example in calls:
            made = call(*(layer(value) for layer, value in zip(before, inputs, strict=True)))
            first, *more = _parts(made, example)
            outputs += [behind(first), *more]
        return outputs


def _parts(made: Any, example: Any) -> list[Any]:
    """The tensors in what a call gives, which may be traced: `example` shows how they are nested."""
    if isinstance(example, list | tuple):
        nested = [_parts(made[index], one) for index, one in enumerate(example)]
        return [part for parts in nested for part in parts]
    return [] if example is None else [made]


def failures(cases: Sequence[Case]) -> list[str]:
    """What is wrong where these calls of the same inputs go through in one model."""
    torch.manual_seed(0)
    inputs = INPUTS[cases[0].inputs]
    model = Between(cases, inputs).eval()
    with torch.no_grad():
        wanted = tensors_of(model(*(x.clone() for x in inputs)))
    program = build_program(model, inputs, resolve_recipe("w8a8"))
    with torch.no_grad():
        off = largest_difference(wanted, tensors_of(program.student(*inputs)))
    if not off <= 1e-5:
        return [f"the traced graph is off by {off:.1g}"]
    calibrate(program.student, [inputs], method="minmax")
    lowered = lower(program.student).graph_module
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export(program, lowered, path)
        checked = validate(program.student, lowered, path, [inputs])
    return [f for f in checked.failures if "predictions" not in f]  # of 4 samples, some are ties


def _names_it(case: Case, text: str) -> bool:
    """Whether a message says which call it is about."""
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", case.name).lower().rstrip("_")
    plain = text.lower().replace("_", "")
    return "calls.0" in text or case.name in text or snake.replace("_", "") in plain


def outcome(case: Case) -> Outcome:
    """How one call alone comes through."""
    try:
        found = failures([case])
    except SqakdError as error:
        text = str(error)
        return Outcome(case, "refused" if _names_it(case, text) else "wrong", text)
    except Exception as error:  # what no user should see
        return Outcome(case, "wrong", f"{type(error).__name__}: {error}".splitlines()[0])
    return Outcome(case, "wrong" if found else "exact", "; ".join(found))


def outcomes(cases: Sequence[Case]) -> list[Outcome]:
    """How calls of one name and the same inputs come through."""
    try:
        if len(cases) > 1 and not failures(cases):
            return [Outcome(case, "exact") for case in cases]
    except Exception:  # one of them, which is then found
        pass
    return [outcome(case) for case in cases]


def markdown(found: Sequence[Outcome]) -> str:
    """What is refused, with what is said, and what was not tried."""
    lines = ["| call | reason |", "|---|---|"]
    for one in found:
        if one.result == "refused":
            lines.append(f"| `{one.case.text}` | {one.reason.replace('|', '/')} |")
    lines += ["", "| not tried | reason |", "|---|---|"]
    for reason, names in itertools.groupby(LEFT_OUT, key=lambda name: LEFT_OUT[name]):
        lines.append(f"| {', '.join(f'`{name}`' for name in names)} | {reason} |")
    return "\n".join(lines) + "\n"


HEADER = """# torch.nn

    python benchmarks/torch_nn.py --docs docs/torch-nn.md

puts {calls} calls of {names} modules and functions of torch {torch} between two 8-bit layers, traces, lowers,
exports and runs them. {exact} calls are exact: the traced graph equals the model, and ONNX Runtime gives the
integer program's codes. {refused} are refused, with a reason:

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("globs", nargs="*", default=["*"])
    parser.add_argument("--docs", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    every = all_cases()
    asked = set(chosen(dict.fromkeys(c.name for c in every), options.globs))
    cases = [c for c in every if c.name in asked]
    found: list[Outcome] = []
    groups = sorted(cases, key=lambda c: (c.name, c.inputs))
    for _, group in itertools.groupby(groups, key=lambda c: (c.name, c.inputs)):
        for one in outcomes(list(group)):
            found.append(one)
            print(f"{one.result:8} {one.case.text}  {one.reason}", flush=True)
    counts = {r: sum(one.result == r for one in found) for r in ("exact", "refused", "wrong")}
    print(", ".join(f"{count} {result}" for result, count in counts.items()))
    if options.docs:
        names = len({one.case.name for one in found})
        head = HEADER.format(calls=len(found), names=names, torch=torch.__version__, **counts)
        options.docs.write_text(head + markdown(found))
    raise SystemExit(int(counts["wrong"] > 0))


if __name__ == "__main__":
    main()
