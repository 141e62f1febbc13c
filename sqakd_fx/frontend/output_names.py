"""What the outputs of a model are called, in its file, in a recipe and in what a run says.

{"boxes": b, "aux": {"mask": m}}      boxes, aux_mask        keys, and fields of dataclasses and named tuples
return boxes, self.scores(x)          boxes, scores          names of the return statement, where all have one
return x                              output                 else numbers: output_0, output_1, ...
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import SequenceKey, tree_flatten_with_path

from sqakd_fx.frontend.example_call import key_name
from sqakd_fx.ir.tensor_names import free_name, numbered_outputs


def output_key(path: Sequence[Any], index: int, count: int) -> str:
    """An output by its keys in what the model returns, joined by "_"; by its number where it has none."""
    if all(isinstance(key, SequenceKey) for key in path):
        return numbered_outputs(count)[index]
    return "_".join(map(key_name, path))


def output_names(model: nn.Module, output: Any, inputs: Collection[str]) -> tuple[str, ...]:
    """A name of its own for each tensor in what the model returns; `inputs` are the names of its inputs."""
    leaves = [path for path, x in tree_flatten_with_path(output)[0] if isinstance(x, Tensor)]
    said = _returned_names(model, output, inputs) if len(leaves) > 1 else ()
    found: list[str] = []
    for index, path in enumerate(leaves):
        wanted = _printable(_said(said, path) or output_key(path, index, len(leaves)))
        found.append(free_name(wanted or numbered_outputs(len(leaves))[index], {*inputs, *found}))
    return tuple(found)


def _said(said: Sequence[str], path: Sequence[Any]) -> str:
    """The name of a part of a tuple, with the keys inside it; none where `said` has no names."""
    return "_".join([said[path[0].idx], *map(key_name, path[1:])]) if said else ""


def _printable(name: str) -> str:
    return "".join(c if c.isprintable() else "_" for c in name)


def _returned_names(model: nn.Module, output: Any, inputs: Collection[str]) -> tuple[str, ...]:
    """The names of a tuple's parts in forward's return statements; none where these do not tell them apart."""
    if type(output) not in (tuple, list):
        return ()
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(model.forward)))
    except (OSError, TypeError, SyntaxError):
        return ()
    function = tree.body[0]
    if not isinstance(function, ast.FunctionDef) or not function.args.args:
        return ()
    own = function.args.args[0].arg
    said = {_names(value, own) for value in _returned(function)}
    fitting = [names for names in said if len(names) == len(output)]
    if len(fitting) != 1:
        return ()
    names = tuple(name for name in fitting[0] if name)
    apart = len(set(names)) == len(output) and not set(names) & set(inputs)
    return names if apart else ()


def _returned(tree: ast.AST) -> Iterator[ast.expr]:
    """What a function returns, without the functions inside it."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.Return) and child.value is not None:
            yield child.value
        elif not isinstance(child, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            yield from _returned(child)


def _names(value: ast.expr, own: str) -> tuple[str | None, ...]:
    parts = value.elts if isinstance(value, ast.Tuple | ast.List) else []
    return tuple(_name(part, own) for part in parts)


def _name(part: ast.expr, own: str) -> str | None:
    """Of `boxes`, `self.boxes`, `self.boxes(x)` and `boxes.sigmoid()`: boxes; `own` is what the code calls self."""
    if isinstance(part, ast.Call) and isinstance(part.func, ast.Attribute):
        return _name(part.func if _is_own(part.func, own) else part.func.value, own)
    if isinstance(part, ast.Attribute):
        return part.attr if _is_own(part, own) else None
    return part.id if isinstance(part, ast.Name) else None


def _is_own(part: ast.Attribute, own: str) -> bool:
    return isinstance(part.value, ast.Name) and part.value.id == own
