"""What the tensors of an exported file are called: one function names the codes, nobody reads meaning from a name."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from sqakd_fx.ir import meta
from sqakd_fx.ir.quantized_tensors import is_own_operation


def quantized_names(lowered: fx.GraphModule) -> dict[str, str]:
    """The name in the file of every tensor of codes that an integer operation makes, by the name of its node.

    A name is its own: no input, output or stored tensor of the program has it.
    """
    graph = lowered.graph
    taken = {str(n.target) for n in graph.nodes if n.op in ("placeholder", "get_attr")}
    end = graph.output_node()
    taken.update(meta.output_names(end) or numbered_outputs(len(end.all_input_nodes)))
    found: dict[str, str] = {}
    for node in graph.nodes:
        tensor = meta.quantized_tensor(node)
        if tensor is not None and is_own_operation(node):
            found[node.name] = free_name(f"{tensor.path}_quantized", taken)
            taken.add(found[node.name])
    return found


def numbered_outputs(count: int) -> list[str]:
    """Names of outputs that have none of their own: a single one is called "output"."""
    return ["output"] if count == 1 else [f"output_{index}" for index in range(count)]


def free_name(wanted: str, taken: Collection[str]) -> str:
    """`wanted`, with a number behind it where it is among `taken`."""
    name, count = wanted, 1
    while name in taken:
        name, count = f"{wanted}_{count}", count + 1
    return name
