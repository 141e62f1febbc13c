"""A student's graph as data: JSON for its nodes and modules, named tensors for the rest, no Python code and no pickle.

    {"name": "conv_1", "op": "call_function", "target": "torch.conv2d", "args": [{"node": "x"}, ...], "meta": {...}}

A node's operation is one of the closed list in `known_operations.py`. torch.fx writes the names of a graph into Python
code, so every name is held against what such code can hold as a name before a graph is made of it.
"""

from __future__ import annotations

import keyword
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import TensorMetadata

from sqakd_fx.frontend.plain_names import is_plain_name
from sqakd_fx.ir import meta
from sqakd_fx.ir.op_table import Kind
from sqakd_fx.ir.rewriting import get_attribute, owner_of
from sqakd_fx.quant.quantizer import Quantizer, quantizers_of
from sqakd_fx.results.known_operations import ATTRIBUTES, function_of, is_known, name_of
from sqakd_fx.results.saved_modules import decode_module, encode_module
from sqakd_fx.results.saved_values import NotSaved, decode, encode

Spec = dict[str, Any]
_LAYER = TypeAdapter(meta.LayerSettings)


def encode_graph(student: fx.GraphModule) -> Spec:
    """JSON for the nodes and modules of a student; raises NotSaved where it holds code of the user's own."""
    paths = {id(quantizer): path for path, quantizer in quantizers_of(student).items()}
    known: dict[int, str] = {}
    modules: dict[str, Spec] = {
        path: encode_module(student.get_submodule(path), paths) for path in paths.values()
    }
    known.update({id(student.get_submodule(path)): path for path in modules})
    for node in student.graph.find_nodes(op="call_module"):
        path = str(node.target)
        module = student.get_submodule(path)
        if known.setdefault(id(module), path) == path:
            modules[path] = modules.get(path) or encode_module(module, paths)
        else:
            modules[path] = {"kind": "same", "as": known[id(module)]}
    tensors = tensors_in(student)
    first: dict[int, str] = {}
    return {
        "modules": modules,
        "tensors": {name: _tensor_kind(one) for name, one in tensors.items()},
        "same": {
            name: first[id(one)]
            for name, one in tensors.items()
            if first.setdefault(id(one), name) != name
        },
        "nodes": _encode_nodes(student, paths),
    }


def _encode_nodes(student: fx.GraphModule, paths: Mapping[int, str]) -> list[Spec]:
    """All nodes, but for classes of the user's own that only hold what the model gives."""
    structures = {node: _parts(node) for node in student.graph.nodes if _is_structure(node)}
    found = []
    for node in student.graph.nodes:
        if node not in structures:
            args, kwargs = fx.map_arg(
                (node.args, dict(node.kwargs)), lambda one: structures.get(one, one)
            )
            found.append(_encode_node(node, args, kwargs, paths))
    return found


def _is_structure(node: fx.Node) -> bool:
    made = (
        node.op == "call_function"
        and isinstance(node.target, type)
        and name_of(node.target) is None
    )
    return made and all(user.op == "output" for user in node.users)


def _parts(node: fx.Node) -> Any:
    return (*node.args, *node.kwargs.values()) if node.args else dict(node.kwargs)


def tensors_in(student: fx.GraphModule) -> dict[str, Tensor]:
    """Every tensor that a student computes with, by name: parameters, all buffers, and constants of its graph."""
    found: dict[str, Tensor] = dict(student.named_parameters(remove_duplicate=False))
    found |= dict(student.named_buffers(remove_duplicate=False))
    for node in student.graph.find_nodes(op="get_attr"):
        value = get_attribute(student, str(node.target))
        if not isinstance(value, Tensor):
            raise NotSaved(f"reads {node.target}, which is no tensor")
        found[str(node.target)] = value
    return found


def _tensor_kind(tensor: Tensor) -> str:
    return "parameter" if isinstance(tensor, nn.Parameter) else "buffer"


def _encode_node(
    node: fx.Node, args: Iterable[Any], kwargs: Mapping[str, Any], paths: Mapping[int, str]
) -> Spec:
    return {
        "name": _name(node.name),
        "op": node.op,
        "target": _encode_target(node),
        "args": [encode(one) for one in args],
        "kwargs": {key: encode(one) for key, one in kwargs.items()},
        "meta": _encode_meta(node, paths),
    }


def _encode_target(node: fx.Node) -> str:
    target = str(node.target)
    if node.op == "placeholder":
        return _name(target)
    if node.op != "call_function":
        if node.op == "call_method" and not is_known(target):
            raise NotSaved(f"calls the method {target!r} at {node.name}")
        return target
    name = name_of(node.target)
    if name is None or (name == "getattr" and node.args[1] not in ATTRIBUTES):
        called = getattr(node.target, "__qualname__", node.target)
        raise NotSaved(f"calls {called} at {node.name}")
    return name


def _encode_meta(node: fx.Node, paths: Mapping[int, str]) -> Spec:
    settings, weight_only, kind = meta.layer(node), meta.weight_only(node), meta.arithmetic(node)
    inputs = meta.input_quantizers(node, Quantizer)
    found = {
        "path": meta.module_path(node),
        "whole": meta.is_module(node),
        "tensor": _encode_shape(node.meta.get("tensor_meta")),
        "batch_axes": list(meta.batch_axes(node)),
        "free_axes": list(meta.free_axes(node)),
        "layer": None if settings is None else asdict(settings),
        "weight_only": None if weight_only is None else asdict(weight_only),
        "arithmetic": None if kind is None else kind.name,
        "table": meta.is_table(node),
        "recurrent": meta.is_recurrent(node),
        "affine": meta.is_affine(node),
        "inputs": {name: paths[id(one)] for name, one in inputs.items() if id(one) in paths},
    }
    return {key: value for key, value in found.items() if value}


def _encode_shape(known: Any) -> Any:
    if isinstance(known, TensorMetadata):
        return {"shape": list(known.shape), "dtype": encode(known.dtype)}
    if isinstance(known, tuple | list):
        return [_encode_shape(one) for one in known]
    return None


def decode_graph(spec: Spec, tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    """The student that `encode_graph` and `tensors_in` were taken from, in evaluation mode.

    Raises:
        UnknownFamilyError: it needs a quantizer family that nobody has registered. ValueError, KeyError, TypeError and
        others: the data is damaged, or names what no saved graph may call.
    """
    root = fx.GraphModule(nn.Module(), fx.Graph())
    quantizers: dict[str, nn.Module] = {}
    modules: dict[str, nn.Module] = {}
    specs = sorted(spec["modules"].items(), key=lambda item: item[1]["kind"] != "quantizer")
    for path, one in specs:
        if one["kind"] != "same":
            modules[path] = decode_module(one, quantizers)
        if isinstance(modules.get(path), Quantizer):
            quantizers[path] = modules[path]
    for path, one in sorted(specs, key=lambda item: item[0].count(".")):
        _place(root, path, modules[one["as"] if one["kind"] == "same" else path])
    _fill(root, spec, tensors)
    graph = _decode_nodes(spec["nodes"], root)
    graph.lint()
    return fx.GraphModule(root, graph, "Student").eval()


def _place(root: fx.GraphModule, path: str, module: nn.Module) -> None:
    owner, last = owner_of(root, _path(path))
    owner.add_module(last, module)


def _fill(root: fx.GraphModule, spec: Spec, tensors: Mapping[str, Tensor]) -> None:
    """Put the tensors in their places; raises ValueError where a module lacks one."""
    made: dict[str, Tensor] = {}
    for name, kind in spec["tensors"].items():
        same = spec["same"].get(name)
        value = made[same] if same else tensors[name]
        if kind == "parameter" and not same:
            value = nn.Parameter(value, requires_grad=False)
        made[name] = value
        owner, last = owner_of(root, _path(name))
        if kind == "parameter":
            owner.register_parameter(last, value)  # type: ignore[arg-type]
        else:
            owner.register_buffer(last, value)
    every = [*root.named_parameters(), *root.named_buffers()]
    absent = [name for name, tensor in every if tensor.is_meta]
    if absent:
        raise ValueError(f"the tensor {absent[0]!r} is missing")


def _decode_nodes(specs: Iterable[Spec], root: fx.GraphModule) -> fx.Graph:
    graph, nodes = fx.Graph(), dict[str, fx.Node]()
    for one in specs:
        name = _name(one["name"])
        if name in nodes:
            raise ValueError(f"two nodes are called {name!r}")
        args = tuple(decode(value, nodes) for value in one["args"])
        kwargs = {_name(key): decode(value, nodes) for key, value in one["kwargs"].items()}
        target = _decode_target(one["op"], one["target"], args)
        node = graph.create_node(one["op"], target, args, kwargs)
        node.name = name
        nodes[name] = node
        _decode_meta(one["meta"], node, root)
    return graph


def _decode_target(op: str, target: str, args: tuple[Any, ...]) -> Any:
    if op == "call_function":
        function = function_of(target)
        if function is None or (function is getattr and args[1] not in ATTRIBUTES):
            raise ValueError(f"{target!r} is no operation that a saved graph may call")
        return function
    if op == "call_method":
        if not is_known(target):
            raise ValueError(f"{target!r} is no method that a saved graph may call")
        return target
    if op in ("call_module", "get_attr"):
        return _path(target)
    if op in ("placeholder", "output"):
        return _name(target)
    raise ValueError(f"there is no kind of node {op!r}")


def _decode_meta(spec: Spec, node: fx.Node, root: fx.GraphModule) -> None:
    meta.set_module_path(node, str(spec.get("path", "")))
    meta.set_is_module(node, bool(spec.get("whole")))
    if shape := _decode_shape(spec.get("tensor")):
        node.meta["tensor_meta"] = shape
    if axes := spec.get("batch_axes"):
        meta.set_batch_axes(node, tuple(int(axis) for axis in axes))
    if axes := spec.get("free_axes"):
        meta.set_free_axes(node, tuple(int(axis) for axis in axes))
    if settings := spec.get("layer"):
        meta.set_layer(node, _LAYER.validate_python(settings))
    if settings := spec.get("weight_only"):
        meta.set_weight_only(node, _LAYER.validate_python(settings))
    if kind := spec.get("arithmetic"):
        meta.set_arithmetic(node, Kind[kind])
    if spec.get("table"):
        meta.set_table(node)
    if spec.get("recurrent"):
        meta.set_recurrent(node)
    if spec.get("affine"):
        meta.set_affine(node)
    for tensor, path in spec.get("inputs", {}).items():
        meta.set_input_quantizer(node, tensor, root.get_submodule(path))


def _decode_shape(spec: Any) -> Any:
    if isinstance(spec, list):
        return tuple(_decode_shape(one) for one in spec)
    if spec is None:
        return None
    shape = torch.Size(int(size) for size in spec["shape"])
    dtype = decode(spec["dtype"], {})
    return TensorMetadata(shape, dtype, False, (), torch.contiguous_format, False, {})


def _name(text: Any) -> str:
    """A name that Python code can hold as it is."""
    if not (isinstance(text, str) and text.isidentifier() and not keyword.iskeyword(text)):
        raise NotSaved(f"has a node or an argument called {text!r}")
    return text


def _path(text: Any) -> str:
    if not (isinstance(text, str) and all(map(is_plain_name, text.split(".")))):
        raise ValueError(f"{text!r} is no path of a module or a tensor")
    return text
