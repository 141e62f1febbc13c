"""Names that a graph can hold: torch.fx writes the names of modules and inputs into Python code."""

from __future__ import annotations

import keyword
import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor, fx, nn

from sqakd_fx.ir import meta
from sqakd_fx.ir.tensor_names import free_name

_LONGEST = 200
_OF_THE_CODE = ("self", "torch", "device", "inf", "nan", "NoneType", "pytree", "fx_pytree")
"""Names that the generated code uses itself."""
_OF_A_GRAPH_MODULE = frozenset(dir(fx.GraphModule)) | {"meta"}


def input_name(wanted: str, taken: Collection[str]) -> str:
    """`wanted` as a parameter's name of Python code, with a number behind it where it is among `taken`."""
    name = re.sub(r"\W", "_", unicodedata.normalize("NFKC", wanted)) or "input"
    name = name if name.isidentifier() else f"_{name}"
    if keyword.iskeyword(name) or name in _OF_THE_CODE:
        name += "_"
    return free_name(name, taken)


def plain_paths(model: nn.Module) -> dict[str, str]:
    """A plain path for each module, parameter and buffer whose own has quotes, dots, keywords and the like in it."""
    return {path: plain for path, plain in _paths(model, "", "", root=True) if path != plain}


def _paths(module: nn.Module, path: str, plain: str, *, root: bool) -> Iterator[tuple[str, str]]:
    children: dict[str, Any] = {**module._modules, **module._parameters, **module._buffers}
    taken = set(children)
    for name, child in children.items():
        known = name if is_plain_name(name) else free_name(_plain(name), taken)
        taken.add(known)
        inner = f"{path}.{name}" if path or not root else name
        plain_inner = f"{plain}.{known}" if plain else known
        yield inner, plain_inner
        if isinstance(child, nn.Module):
            yield from _paths(child, inner, plain_inner, root=False)


def is_plain_name(name: str) -> bool:
    """Whether code can say `self.<name>`, or `getattr(self, "<name>")` where it is no identifier."""
    return (
        0 < len(name) <= _LONGEST
        and name.isprintable()
        and not any(c in name for c in '."\\')
        and unicodedata.normalize("NFKC", name) == name
        and not keyword.iskeyword(name)
        and name not in _OF_A_GRAPH_MODULE
    )


def _plain(name: str) -> str:
    name = re.sub(r"\W", "_", unicodedata.normalize("NFKC", name))[:_LONGEST]
    return f"{name}_" if not name or keyword.iskeyword(name) or name in _OF_A_GRAPH_MODULE else name


def object_at(root: nn.Module, path: str) -> Any:
    """The module, parameter, buffer or attribute at a path whose names may have dots in them."""
    found: Any = root
    for name in path.split("."):
        found = getattr(found, name, None)
    if isinstance(found, nn.Module | Tensor):
        return found
    every = (root.named_modules, root.named_parameters, root.named_buffers)
    return {k: v for known in every for k, v in known(remove_duplicate=False)}.get(path, found)


def graph_module_of(
    root: nn.Module, graph: fx.Graph, name: str, plain: Mapping[str, str]
) -> fx.GraphModule:
    """The graph over the modules of `root`, which have the names that `plain` gives them."""
    if not plain:
        return fx.GraphModule(root, graph, name)
    objects: dict[str, Any] = {}
    for node in graph.nodes:
        path = meta.module_path(node)
        meta.set_module_path(node, plain.get(path, path))
        if node.op in ("call_module", "get_attr"):
            target = str(node.target)
            node.target = plain.get(target, target)
            objects[node.target] = object_at(root, target)
    made = fx.GraphModule(objects, graph, name)
    made.training = root.training
    return made
