"""Small helpers on torch.fx graphs that several passes need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import _extract_tensor_metadata

from sqakd_fx.ir import meta


def get_attribute(graph_module: nn.Module, target: str) -> Any:
    """The parameter, buffer or attribute behind a dotted get_attr target."""
    value: Any = graph_module
    for part in target.split("."):
        value = getattr(value, part)
    return value


def _exists(graph_module: nn.Module, target: str) -> bool:
    try:
        get_attribute(graph_module, target)
    except AttributeError:
        return False
    return True


def attribute_name(graph_module: nn.Module, wanted: str) -> str:
    """`wanted`, with a number behind it where something of that name exists.

    Parts that are names of nn.Module's own methods (a node called "half") get an underscore.
    """
    wanted = ".".join(f"{p}_" if hasattr(fx.GraphModule, p) else p for p in wanted.split("."))
    name, count = wanted, 1
    while _exists(graph_module, name):
        name, count = f"{wanted}_{count}", count + 1
    return name


def owner_of(graph_module: fx.GraphModule, name: str) -> tuple[nn.Module, str]:
    """The module that holds the dotted `name`, created where it is missing, and the last part."""
    *path, last = name.split(".")
    module: nn.Module = graph_module
    for part in path:
        child = getattr(module, part, None)
        if not isinstance(child, nn.Module):
            child = nn.Module()
            module.add_module(part, child)
        module = child
    return module, last


def _outside_scripts(graph_module: fx.GraphModule, name: str) -> str:
    """The dotted name beside the TorchScript module that it would lie in: those take no attributes."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        path = ".".join(parts[:i])
        if not _exists(graph_module, path):
            break
        if isinstance(get_attribute(graph_module, path), torch.jit.ScriptModule):
            return ".".join([*parts[: i - 1], "_".join(parts[i - 1 :])])
    return name


def set_attribute(graph_module: fx.GraphModule, wanted: str, value: Tensor | nn.Module) -> str:
    """Register a parameter, a buffer or a submodule under a free dotted name; returns the name."""
    name = attribute_name(graph_module, _outside_scripts(graph_module, wanted))
    owner, last = owner_of(graph_module, name)
    if isinstance(value, nn.Module):
        owner.add_module(last, value)
    elif isinstance(value, nn.Parameter):
        owner.register_parameter(last, value)
    else:
        owner.register_buffer(last, value)
    return name


def insert_attribute(
    graph_module: fx.GraphModule, before: fx.Node, wanted: str, value: Tensor
) -> fx.Node:
    """Register a tensor and read it with a get_attr node in front of `before`."""
    name = set_attribute(graph_module, wanted, value)
    with graph_module.graph.inserting_before(before):
        return read_attribute(graph_module, name)


def read_attribute(graph_module: fx.GraphModule, name: str) -> fx.Node:
    """A get_attr node of a tensor, with its shape and its module's path, where the graph inserts nodes."""
    node = graph_module.graph.get_attr(name)
    node.meta["tensor_meta"] = _extract_tensor_metadata(get_attribute(graph_module, name))
    meta.set_module_path(node, name.rpartition(".")[0])
    return node


def paths_and_parents(paths: Iterable[str]) -> set[str]:
    """Module paths with every path that they lie under; not the root."""
    parts = [path.split(".") for path in paths if path]
    return {".".join(one[:length]) for one in parts for length in range(1, len(one) + 1)}


def node_path(node: fx.Node) -> str:
    """A name for what a node computes: its own module's path, or its name inside the user's module."""
    path = meta.module_path(node)
    if meta.is_module(node):
        return path
    return f"{path}.{node.name}" if path else node.name


def reads_of(graph: fx.Graph) -> Counter[str]:
    """How many nodes read each parameter, buffer or attribute."""
    reads: Counter[str] = Counter()
    for node in graph.nodes:
        if node.op == "get_attr":
            reads[str(node.target)] += len(node.users)
    return reads


def name_once(graph_module: fx.GraphModule) -> bool:
    """Read a parameter that several modules hold by one name, so that its readers are seen to read the same.

    True where a name changed.
    """
    names: dict[int, str] = {}
    changed = False
    for node in graph_module.graph.find_nodes(op="get_attr"):
        value = get_attribute(graph_module, str(node.target))
        first = names.setdefault(id(value), str(node.target))
        if isinstance(value, nn.Parameter) and first != node.target:
            node.target = first
            changed = True
    return changed


def drop_unused(graph_module: fx.GraphModule) -> None:
    """Delete submodules, parameters and buffers that no node reads."""
    called = {str(n.target) for n in graph_module.graph.nodes if n.op == "call_module"}
    read = {str(n.target) for n in graph_module.graph.nodes if n.op == "get_attr"}
    inside = {id(inner) for name in called for inner in graph_module.get_submodule(name).modules()}
    used = paths_and_parents([*called, *read])
    for name, module in list(graph_module.named_modules(remove_duplicate=False)):
        if name and name not in used and id(module) not in inside:
            graph_module.delete_submodule(name)
    for owner_name, owner in graph_module.named_modules():
        if id(owner) in inside:
            continue
        prefix = f"{owner_name}." if owner_name else ""
        for table in (owner._parameters, owner._buffers):
            for key in [k for k in table if f"{prefix}{k}" not in read]:
                del table[key]


def constant_of(graph_module: fx.GraphModule, node: Any) -> Tensor | None:
    """The tensor behind a get_attr node, None for anything else."""
    if isinstance(node, fx.Node) and node.op == "get_attr":
        value = get_attribute(graph_module, str(node.target))
        return value if isinstance(value, torch.Tensor) else None
    return None


def call_like(
    graph_module: fx.GraphModule, like: fx.Node, target: Any, *args: Any, **kwargs: Any
) -> fx.Node:
    """A new call at the insertion point that stands for a part of what `like` computes."""
    new = graph_module.graph.call_function(target, args, kwargs)
    meta.keep_origin(new, like)
    return new


def replace_node(
    graph_module: fx.GraphModule,
    node: fx.Node,
    target: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
) -> bool:
    """Put a call of `target` in the place of `node`, with its name and metadata; returns True."""
    with graph_module.graph.inserting_before(node):
        new = graph_module.graph.call_function(target, args, dict(kwargs or {}))
    new.meta = dict(node.meta)
    name = node.name
    node.replace_all_uses_with(new)
    graph_module.graph.erase_node(node)
    new.name = name
    return True
