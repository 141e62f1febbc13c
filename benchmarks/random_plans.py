"""Random networks at random bits: on how many do all stages of the compiler agree?

    python benchmarks/random_plans.py COUNT [--seed FIRST] [--target NAME]

takes the networks of the numbers FIRST, FIRST + 1, ..., in a random profile or for a target. It prints each on which
the stages do not agree, and each that the target refuses by the name of an operation; exit code 1 where one disagrees.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

from sqakd_fx.errors import ExportError

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from random_networks import RUNS, random_case, wrong_of, wrong_of_other


def outcome(number: int, target: str) -> tuple[str, str]:
    """`agrees`, `disagrees` or `refused`, and why."""
    case = random_case(number)
    try:
        if target in RUNS:
            found = wrong_of_other(case, target)
        else:
            found = wrong_of(replace(case, target=target))
    except ExportError as error:
        invalid = "not valid" in str(error) or "refuses the model" in str(error)
        return "disagrees" if invalid else "refused", f"{error}\n    {case}"
    except Exception as error:  # what this looks for
        return "disagrees", f"{type(error).__name__}: {error}\n    {case}"
    return ("disagrees" if found else "agrees"), f"{'; '.join(found)}\n    {case}"


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--target", choices=("tensorrt", "openvino", *RUNS), default="")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    counts, started = Counter[str](), time.perf_counter()
    with contextlib.suppress(KeyboardInterrupt):
        for number in range(options.seed, options.seed + options.count):
            kind, why = outcome(number, options.target)
            counts[kind] += 1
            if kind != "agrees":
                print(f"{number} {kind}: {why}", flush=True)
    said = ", ".join(f"{counts[kind]} {kind}" for kind in ("agrees", "refused", "disagrees"))
    print(f"{counts.total()} networks: {said} ({time.perf_counter() - started:.0f} s)")
    raise SystemExit(int(counts["disagrees"] > 0))


if __name__ == "__main__":
    main()
