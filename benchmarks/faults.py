"""A campaign of faults: hostile settings, bad files, hostile result folders, and kills.

    python benchmarks/faults.py settings          every recipe key with hostile values, each through a small run
    python benchmarks/faults.py options           every option of the command line with hostile texts
    python benchmarks/faults.py data              data that should not be given, of many kinds and in many places
    python benchmarks/faults.py folders           result folders of somebody else: each file, damaged in many ways
    python benchmarks/faults.py files             files that were made to do harm: code, bombs, links, escapes
    python benchmarks/faults.py kills --count 40  a run killed at random moments, in several set-ups, then resumed

What is not success or one sentence is a fault, and is listed. Exit status 1 where there is one.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from kills import kills_campaign

os.environ.setdefault("OMP_NUM_THREADS", "1")

HOSTILE = (
    "-1", "0", "1", "3", "2147483648", "9223372036854775808", "1180591620717411303424", "-1e400", "1e308", "inf", "nan",
    "0.5", "true", '""', '"' + "x" * 300 + '"', '"\\u001b[31m[/]"', "[]", "[0]", "[-1, 99]", '["a"]', "{}", '{a = 1}',
    '{"*" = "kl"}', '{"*" = -7}', "[[[[]]]]", "1979-05-27", "word", "",
)  # fmt: skip
"""TOML values for any key of a recipe."""


GOOD = frozenset(("success", "sentence"))


@dataclass(frozen=True)
class Fault:
    """What was tried, and what came of it that should not."""

    what: str
    outcome: str


def outcome_of(action: Callable[[], Any]) -> str:
    """ "success", "sentence", or the last lines of a traceback."""
    from sqakd_fx.errors import SqakdError

    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            action()
    except SqakdError as error:
        text = str(error)
        return "sentence" if text and "\n" not in text else f"not one sentence: {text!r}"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:100]} ({Path(where.filename).name}:{where.lineno})"
    return "success"


# -- settings ---------------------------------------------------------------------------------------


def small_run(settings: Sequence[str], folder: Path) -> None:
    """A recipe with these settings through tracing, calibration and one step of training."""
    import torch
    from torch import nn

    import sqakd_fx

    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3)
    ).eval()
    images = torch.randn(40, 1, 5, 5)
    fixed = {"steps": 1, "batch_size": 8, "calibration_batches": 1}
    named = {text.partition("=")[0] for text in settings}
    fields = {key: value for key, value in fixed.items() if key not in named}
    recipe = sqakd_fx.resolve_recipe("w4a4", settings=settings, **fields)
    recipe = recipe.model_copy(update={"steps": min(recipe.steps or 1, 1), "compile": "never"})
    program = sqakd_fx.build_program(net, images[:2], recipe)
    sqakd_fx.calibrate(program, images)
    sqakd_fx.distil(program, images, folder=folder)


def is_taken(text: str) -> bool:
    """Whether a recipe takes a setting."""
    from sqakd_fx.recipe.resolution import resolve_recipe

    return outcome_of(lambda: resolve_recipe("w4a4", settings=[text])) == "success"


def hostile_settings() -> list[str]:
    """key=value for every key of a recipe and every hostile value."""
    from sqakd_fx.recipe.keys import Recipe

    keys = [*Recipe.model_fields, "override.0.match", "", "no such key"]
    return [f"{key}={value}" for key in keys for value in HOSTILE]


def settings_campaign(count: int) -> Iterator[tuple[str, str]]:
    chosen = hostile_settings()
    random.Random(0).shuffle(chosen)
    for text in sorted(chosen[:count]):
        with tempfile.TemporaryDirectory() as folder:
            yield text[:60], outcome_of(lambda: small_run([text], Path(folder)))  # noqa: B023


# -- options ------------------------------------------------------------------------------------------

TEXTS = (
    "", "x" * 300, "x" * 5000, "/" + "y/" * 3000, "a\\0b", "\x1b[31m[/]", "-1", "0", "1e400", "2147483648",
    "9" * 40, "1,3,", "999999999,999999999,9999", "1x1x0", ".", "..", "/", "/dev/null", "nothing.py", "torch:nope",
    ":", "a:b:c", "bits=", "bits=nan", "bits=1e400", "size=-1MB", "w0a0", "w4a4w4", "paper/x-w1a1", "[" * 50_000,
    "steps=" + "[" * 50_000, "a=1", "=", "é", "\ud800", "os:getcwd",
)  # fmt: skip
"""What a user, or a script, may give for any option."""
USUAL = {
    "quantize": {"source": "model.py", "--steps": "0"},
    "sensitivity": {"source": "model.py", "--candidates": "8", "--samples": "8"},
    "inspect": {"target": "model.py"},
    "export": {"result": "net"},
    "validate": {"target": "net"},
}
"""What else a command is given."""
DANGEROUS = frozenset(
    (("quantize", "--dump", "/"), ("example", "folder", "/"), ("example", "folder", ".."))
)
"""Options that write where they are told to."""
SMALL = """
import torch
def model(): return torch.nn.Linear(4, 4)
def example_inputs(): return torch.zeros(2, 4)
def train_data(): return torch.zeros(64, 4)
"""
_ENDS = 120
"""Seconds after which a case has hung."""


@dataclass(frozen=True)
class Option:
    """An option or an argument of a command, and how many texts it takes."""

    command: str
    name: str
    texts: int

    def arguments(self, text: str, usual: Mapping[str, str]) -> list[str]:
        """A command line with `text` for this one, and what is usual for the others."""
        given = {**usual, self.name: text}
        line = [self.command]
        for name, value in given.items():
            count = self.texts if name == self.name else 1
            line += [value] if not name.startswith("-") else [name, *[value] * count]
        return line


def all_options() -> list[Option]:
    """Every option and argument of every command that takes a text."""
    import typer

    from sqakd_fx.cli.main import app

    commands: Any = typer.main.get_command(app)
    found = []
    for command, one in commands.commands.items():
        for param in one.params:
            if getattr(param, "is_flag", False) or param.name == "help":
                continue
            found.append(Option(command, param.opts[0], param.nargs))
    return found


def options_campaign(count: int) -> Iterator[tuple[str, str]]:
    """Every option of every command with hostile texts, in a folder of its own with a small model and its result."""
    cases = [(option, text) for option in all_options() for text in TEXTS]
    cases = [(o, text) for o, text in cases if (o.command, o.name, text) not in DANGEROUS]
    random.Random(0).shuffle(cases)
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as scratch:
        made_folder(Path(scratch) / "inner" / "net")
        os.chdir(Path(scratch) / "inner")
        Path("model.py").write_text(SMALL)
        precious = {path: path.read_bytes() for path in (Path("model.py"), Path("net/graph.json"))}
        try:
            for option, text in cases[:count]:
                usual = USUAL.get(option.command, {})
                told = answer_of(option.arguments(text, usual))
                if any(path.read_bytes() != content for path, content in precious.items()):
                    told = "something was lost"
                yield f"{option.command} {option.name} {text[:40]!r}", told
        finally:
            os.chdir(before)


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    """Inside, what has no end raises TimeoutError."""

    def hang(*_: Any) -> None:
        raise TimeoutError(f"no end within {_ENDS} s")

    signal.signal(signal.SIGALRM, hang)
    signal.alarm(_ENDS)
    try:
        yield
    finally:
        signal.alarm(0)


def answer_of(arguments: Sequence[str], printed: IO[str] | None = None) -> str:
    """What a command line answers: "success", "sentence", or what it should not; what it prints goes to `printed`."""
    from typer.testing import CliRunner

    from sqakd_fx.cli.main import app

    with time_limit():
        done = CliRunner().invoke(app, list(arguments))
    if printed is not None:
        printed.write(done.output)
    return _said(done.exit_code, done.exception, done.stderr)


# -- data ---------------------------------------------------------------------------------------------


def data_campaign(count: int) -> Iterator[tuple[str, str]]:
    """Runs on data that should not be given."""
    from bad_data import cases, run

    for case in itertools.islice(cases(), count):
        with time_limit():
            yield case.what, outcome_of(lambda: run(case))  # noqa: B023


# -- result folders -----------------------------------------------------------------------------------


def made_folder(out: Path) -> None:
    """A finished result of a small model."""
    import torch
    from torch import nn

    import sqakd_fx

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    images = torch.randn(64, 1, 8, 8)
    recipe = {"steps": 0, "batch_size": 16}
    sqakd_fx.quantize(net, images, example_inputs=images[:2], recipe=recipe, out=out)


def damages(content: bytes, chance: random.Random) -> Iterator[tuple[str, bytes]]:
    """A file's content in many ways that it should not have."""
    yield "empty", b""
    yield "half", content[: len(content) // 2]
    yield "noise", chance.randbytes(200)
    yield "a list", b"[]"
    yield "a number", b"3"
    yield "nested", b"[" * 100_000
    yield "a record", b"{}"
    for _ in range(3):
        place = chance.randrange(max(len(content), 1))
        yield f"byte {place} changed", content[:place] + b"\xff" + content[place + 1 :]


def folders_campaign(count: int) -> Iterator[tuple[str, str]]:
    """Each file of a result damaged; every command must give one sentence or succeed, and nothing is run or written."""
    commands = (["validate"], ["inspect"], ["inspect", "--stage", "lowered"], ["export"])
    chance = random.Random(0)
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "whole"
        made_folder(whole)
        names = (
            "program.json",
            "graph.json",
            "recipe.toml",
            "student.safetensors",
            "example.safetensors",
            "model.onnx",
        )
        cases = [
            (name, told, content)
            for name in names
            for told, content in damages((whole / name).read_bytes(), chance)
        ]
        for index, (name, told, content) in enumerate(cases[:count]):
            command = commands[index % len(commands)]
            folder = shutil.copytree(whole, Path(scratch) / "net", dirs_exist_ok=True)
            (folder / name).write_bytes(content)
            answer = answer_of([command[0], str(folder), *command[1:]])
            yield f"{name}: {told} ({' '.join(command)})", answer


# -- files of somebody else ---------------------------------------------------------------------------

_ORDERS = ("\x1b", "\x07", "\x9b", "\u202e", "\r")
"""What gives a terminal orders."""


def files_campaign(count: int) -> Iterator[tuple[str, str]]:
    """Files that were made to do harm: nothing is run, nothing written outside, no order reaches the terminal."""
    from hostile_files import cases

    before = Path.cwd()
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "net"
        made_folder(result)
        try:
            made = cases()
            random.Random(0).shuffle(made)
            for index, (what, make) in enumerate(made[:count]):
                folder = Path(scratch) / str(index)
                folder.mkdir()
                yield what, _harm_of(make, folder, result)
        finally:
            os.chdir(before)


def _harm_of(make: Callable[[Any], list[str]], folder: Path, result: Path) -> str:
    """What a hostile file did, or how a command answered to it."""
    from hostile_files import prepared, state_of

    place = prepared(folder, result)
    arguments = make(place)
    untouched = state_of(folder)
    os.chdir(place.folder)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        told = answer_of(arguments, said)
    if place.mark.exists():
        return "code was run"
    if state_of(folder) != untouched:
        return "something outside was changed"
    orders = [order for order in _ORDERS if order in said.getvalue()]
    return f"orders for the terminal: {orders}" if orders else told


def _said(status: int, error: BaseException | None, stderr: str) -> str:
    if error is not None and not isinstance(error, SystemExit):
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:100]} ({Path(where.filename).name}:{where.lineno})"
    told = [line for line in stderr.splitlines() if line.startswith("sqakd-fx:")]
    if status == 2:
        return "sentence" if len(told) == 1 else f"{len(told)} sentences"
    return "success" if status in (0, 1) else f"exit status {status}"


CAMPAIGNS: dict[str, Callable[[int], Iterator[tuple[str, str]]]] = {
    "settings": settings_campaign,
    "options": options_campaign,
    "data": data_campaign,
    "folders": folders_campaign,
    "files": files_campaign,
    "kills": kills_campaign,
}


def campaign(name: str, count: int, show: bool) -> list[Fault]:
    """The faults of a campaign, told as they come."""
    tally: Counter[str] = Counter()
    faults = []
    for what, outcome in CAMPAIGNS[name](count):
        good = outcome in GOOD
        tally[outcome if good else "fault"] += 1
        if not good:
            faults.append(Fault(what, outcome))
            print(f"FAULT {what!r}: {outcome}", flush=True)
        elif show:
            print(f"{what!r}: {outcome}", flush=True)
    print(json.dumps({name: dict(tally)}))
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("campaign", choices=CAMPAIGNS)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--show", action="store_true", help="print every case")
    options = parser.parse_args()
    sys.exit(bool(campaign(options.campaign, options.count, options.show)))


if __name__ == "__main__":
    main()
