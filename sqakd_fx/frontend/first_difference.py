"""Where a traced graph first computes something else than its model."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from sqakd_fx.diagnostics.source_lines import code_line
from sqakd_fx.frontend.example_call import Call
from sqakd_fx.frontend.float32 import in_float32
from sqakd_fx.frontend.plain_names import plain_paths
from sqakd_fx.ir import meta
from sqakd_fx.ir.outputs import largest_difference, tensors_of


@dataclass(frozen=True)
class _Called:
    """A module of the model in one call: its path in the graph, what went in and what came out."""

    path: str
    inputs: list[Tensor]
    outputs: list[Tensor]


def first_difference(
    model: nn.Module,
    graph_module: fx.GraphModule,
    call: Call,
    tensors: Mapping[str, Tensor],
    tolerance: float,
) -> str:
    """The module and the line of the user's code where the graph departs, as the end of "differs ...".

    A module's output is missing where no node of the graph computes it on `tensors`.
    """
    with torch.no_grad():
        called = _calls(model, call, tensors)
        computed = _values(graph_module, tensors)

    def is_there(wanted: Tensor) -> bool:
        return any(_same(wanted, value, tolerance) for value in computed.values())

    for one in called:
        if all(map(is_there, one.outputs)):
            continue
        inside = [node for node in computed if _is_under(meta.module_path(node), one.path)]
        if not inside:
            return f"first in {one.path!r}, which the model runs and the graph leaves out"
        what = "the output of" if all(map(is_there, one.inputs)) else "what goes into"
        return f"first in {what} {one.path!r}{_at(inside[-1])}"
    last = [node for node in computed if node.op != "output"]
    return f"in what forward does behind its last layer{_at(last[-1])}" if last else ""


def _at(node: fx.Node) -> str:
    line = code_line(node)
    return f" ({line})" if line else ""


def _is_under(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")


def _same(wanted: Tensor, value: Any, tolerance: float) -> bool:
    if not isinstance(value, Tensor) or value.shape != wanted.shape:
        return False
    if not wanted.is_floating_point():
        return torch.equal(wanted, value)
    return largest_difference([wanted], [value]) <= tolerance


def _calls(model: nn.Module, call: Call, tensors: Mapping[str, Tensor]) -> list[_Called]:
    """What the modules compute, innermost first."""
    found: list[_Called] = []
    plain = plain_paths(model)
    with contextlib.ExitStack() as stack:
        for path, module in model.named_modules():
            if path and not isinstance(module, torch.jit.ScriptModule):

                def keep(_: nn.Module, args: Any, kwargs: Any, out: Any, path: str = path) -> None:
                    given, made = tensors_of((args, kwargs)), tensors_of(out)
                    copies = [[x.clone() for x in part] for part in (given, made)]
                    found.append(_Called(plain.get(path, path), *copies))

                stack.callback(module.register_forward_hook(keep, with_kwargs=True).remove)
        args, kwargs = call.with_tensors({name: x.clone() for name, x in tensors.items()})
        with in_float32():
            model(*args, **kwargs)
    return found


def _values(graph_module: fx.GraphModule, tensors: Mapping[str, Tensor]) -> dict[fx.Node, Any]:
    """What the nodes compute; up to an error of the graph."""
    found: dict[fx.Node, Any] = {}

    class Keep(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            found[n] = None
            value = super().run_node(n)
            found[n] = value.clone() if isinstance(value, Tensor) else value
            return value

    with contextlib.suppress(Exception):
        Keep(graph_module).run(*(x.clone() for x in tensors.values()))
    return found
