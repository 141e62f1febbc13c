"""The shape of the code: file lengths, long parameter lists, `Any`, and which rooms import which.

    python benchmarks/house.py            Markdown tables of the files of this package
    python benchmarks/house.py FOLDER... the same counts of other files, without imports between rooms

A line is a line of a file. A parameter is any of a function's but self and cls. `Any` is counted as a word in code,
imports of it left out.
"""

from __future__ import annotations

import argparse
import ast
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("sqakd_fx", "passes", "exporters")
_INSIDE = ("passes", "exporters")


@dataclass(frozen=True)
class Shape:
    """What is counted of a set of files."""

    lines: dict[Path, int]
    parameters: list[int]
    longest_function: int
    any_words: int

    @property
    def total(self) -> int:
        return sum(self.lines.values())

    @property
    def long_lists(self) -> int:
        """Functions with seven or more parameters."""
        return sum(count >= 7 for count in self.parameters)


def python_files(folders: Iterable[Path]) -> list[Path]:
    """All Python files under some folders, in order."""
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def shape_of(files: Iterable[Path]) -> Shape:
    """Count lines, parameters and `Any`."""
    lines: dict[Path, int] = {}
    parameters: list[int] = []
    longest = any_words = 0
    for path in files:
        text = path.read_text("utf-8")
        lines[path] = len(text.splitlines())
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                parameters.append(_parameters(node.args))
                longest = max(longest, (node.end_lineno or 0) - node.lineno + 1)
            any_words += isinstance(node, ast.Name) and node.id == "Any"
    return Shape(lines, parameters, longest, any_words)


def _parameters(arguments: ast.arguments) -> int:
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    starred = [one for one in (arguments.vararg, arguments.kwarg) if one is not None]
    return len([one for one in (*named, *starred) if one.arg not in ("self", "cls")])


def room_of(path: Path) -> str:
    """The room of a file of this package: a folder, or the name of a top file."""
    first, *rest = path.relative_to(ROOT).parts
    if first in _INSIDE:
        return first
    return rest[0].removesuffix(".py")


def edges(files: Iterable[Path]) -> Counter[tuple[str, str]]:
    """How many imports there are from one room to another, type-checking ones included."""
    found: Counter[tuple[str, str]] = Counter()
    for path in files:
        for target in _imported(ast.parse(path.read_text("utf-8"))):
            if target != room_of(path):
                found[room_of(path), target] += 1
    return found


def _imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "sqakd_fx":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sqakd_fx."):
            yield str(node.module).split(".")[1]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("sqakd_fx.")]
            yield from (name.split(".")[1] for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folders", type=Path, nargs="*", help="this package's own if absent")
    folders = parser.parse_args().folders
    files = python_files(folders or [ROOT / name for name in FOLDERS])
    shape = shape_of(files)
    largest = max(shape.lines, key=lambda path: shape.lines[path])
    print("| | |\n|---|---|")
    print(f"| files, lines | {len(files)}, {shape.total} |")
    middle = statistics.median(shape.lines.values())
    print(
        f"| lines a file, median / largest | {middle:g} / {shape.lines[largest]} ({largest.name}) |"
    )
    share = shape.long_lists / len(shape.parameters)
    print(f"| functions with 7 or more parameters | {shape.long_lists} ({share:.1%}) |")
    print(f"| functions with more than 7 | {sum(count > 7 for count in shape.parameters)} |")
    print(f"| lines of the longest function | {shape.longest_function} |")
    print(f"| `Any` a thousand lines | {1000 * shape.any_words / shape.total:.1f} |")
    if not folders:
        found = edges(files)
        print(f"| edges between rooms, imports over them | {len(found)}, {found.total()} |")
        print("\n| room | imports from |\n|---|---|")
        for room in sorted({room_of(path) for path in files}):
            targets = [f"{to} {n}" for (of, to), n in sorted(found.items()) if of == room]
            if targets:
                print(f"| {room} | {', '.join(targets)} |")


if __name__ == "__main__":
    main()
