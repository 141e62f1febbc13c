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
    "exporters/recurrent.py": "an operation that stands for torch.gru or torch.lstm has its parameters",
    "sqakd_fx/ir/integer_ops.py": "an operation of the integer program takes each tensor as codes, scale, zero point",
    "sqakd_fx/quant/quantizer.py": "an autograd function takes each tensor and setting by itself",
    "sqakd_fx/frontend/attention.py": "it stands in for nn.MultiheadAttention.forward",
    "sqakd_fx/cli/commands/quantize.py": "a command has a parameter for each of its options",
    "sqakd_fx/cli/commands/inspect.py": "a command has a parameter for each of its options",
    "sqakd_fx/cli/commands/sensitivity.py": "a command has a parameter for each of its options",
    "sqakd_fx/cli/commands/results.py": "a command has a parameter for each of its options",
    "sqakd_fx/pipeline.py": "the public API's options, as the command has them",
}
"""Files where a function may have more parameters, and why."""

OPERATIONS_BY_NAME: dict[str, str] = {}
"""Files that compare the name of an operation, and why."""


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


def names_of_operations(function: ast.AST) -> set[str]:
    """The variables of a function that hold an operation's name."""
    given = [n for n in ast.walk(function) if isinstance(n, ast.Assign | ast.NamedExpr)]
    found: set[str] = set()
    for one in given:
        targets = one.targets if isinstance(one, ast.Assign) else [one.target]
        if any(is_operation_name(part, found) for part in alternatives(one.value)):
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def alternatives(value: ast.expr) -> list[ast.expr]:
    """The expressions of which `value` is one: a or b, a if c else b."""
    if isinstance(value, ast.BoolOp):
        return [part for one in value.values for part in alternatives(one)]
    if isinstance(value, ast.IfExp):
        return [*alternatives(value.body), *alternatives(value.orelse)]
    return [value]


def is_operation_name(node: ast.AST, variables: set[str]) -> bool:
    if isinstance(node, ast.Attribute) and node.attr == "name":
        return isinstance(node.value, ast.Name) and node.value.id.split("_")[-1] == "op"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return node.func.id in ("op_name", "module_op_name")
    return isinstance(node, ast.Name) and node.id in variables


def compared_operations(file: Path) -> Iterator[int]:
    """The lines of a file that compare the name of an operation with other than constants of the op table."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    of_table = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "sqakd_fx.ir.op_table"
        for alias in node.names
    }
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        variables = names_of_operations(function)
        for node in ast.walk(function):
            sides: list[ast.expr] = []
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                starts = node.func.attr in ("startswith", "endswith", "removesuffix")
                sides = [node.func.value, *node.args] if starts else []
            elif isinstance(node, ast.Match):
                sides = [node.subject]
            known = any(isinstance(side, ast.Name) and side.id in of_table for side in sides)
            if not known and any(is_operation_name(side, variables) for side in sides):
                yield node.lineno


def test_the_op_table_alone_knows_operations_by_name() -> None:
    found = {
        file.relative_to(ROOT).as_posix(): lines
        for file in FILES
        if file.name != "op_table.py" and (lines := sorted(set(compared_operations(file))))
    }
    assert {file: lines for file, lines in found.items() if file not in OPERATIONS_BY_NAME} == {}
    assert set(found) == set(OPERATIONS_BY_NAME), "a reason that nothing needs"


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
