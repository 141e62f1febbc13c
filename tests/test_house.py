"""Rules of the house that a reader of one file cannot see."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = sorted(
    f for room in ("sqakd_fx", "passes", "exporters") for f in (ROOT / room).rglob("*.py")
)
LONGEST, MOST_PARAMETERS, MOST_MODULES = 60, 7, 10

MANY_PARAMETERS = {
    "exporters/container.py": "a translation has the parameters of its operation",
    "sqakd_fx/ir/integer_ops.py": "an operation of the integer program takes each tensor as codes, scale, zero point",
    "sqakd_fx/quant/quantizer.py": "an autograd function takes each tensor and setting by itself",
    "sqakd_fx/frontend/attention.py": "it stands in for nn.MultiheadAttention.forward",
    "sqakd_fx/cli/main.py": "a command has a parameter for each of its options",
    "sqakd_fx/pipeline.py": "the public API's options, as the command has them",
}
"""Files where a function may have more parameters, and why."""


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield file.relative_to(ROOT).as_posix(), node


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    given = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
    return sum(one.arg not in ("self", "cls") for one in given)


def test_no_function_is_longer_than_a_screen() -> None:
    found = [
        f"{file}: {node.name} has {length} lines"
        for file, node in functions()
        if (length := (node.end_lineno or 0) - node.lineno + 1) > LONGEST
    ]
    assert found == []


def test_no_function_has_many_parameters_but_for_a_reason() -> None:
    many = [(file, node.name) for file, node in functions() if parameters(node) > MOST_PARAMETERS]
    assert [one for one in many if one[0] not in MANY_PARAMETERS] == []
    assert {file for file, _ in many} == set(MANY_PARAMETERS), "a reason that nothing needs"


def test_few_modules_lie_outside_the_rooms() -> None:
    assert len(list((ROOT / "sqakd_fx").glob("*.py"))) <= MOST_MODULES


def test_every_room_says_in_one_sentence_what_lives_there() -> None:
    rooms = [
        file for file in FILES if file.name == "__init__.py" and file.parent.name != "sqakd_fx"
    ]
    for room in rooms:
        said = ast.get_docstring(ast.parse(room.read_text(encoding="utf-8"))) or ""
        assert said.endswith("."), room
        assert "\n" not in said, room


def test_own_keys_of_node_meta_are_read_and_written_in_one_module() -> None:
    meta = ast.parse((ROOT / "sqakd_fx/ir/meta.py").read_text(encoding="utf-8"))
    described = ast.get_docstring(meta) or ""
    own = [line.split()[0] for line in described.splitlines() if line.startswith("    ")]
    own.remove("key")
    assert "module_path" in own
    for file in FILES:
        if file.name == "meta.py":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Subscript):
                holder, key = node.value, node.slice
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
                holder, key = node.func.value, node.args[0]
            else:
                continue
            if isinstance(holder, ast.Attribute) and holder.attr == "meta":
                assert not (isinstance(key, ast.Constant) and key.value in own), (file, key.lineno)
