"""The trained graph against the integer program, one quantized tensor after the other.

The trained graph runs in step with the program: up to the quantizer of the tensor that the program has just
made. Both codes are compared, and the trained graph goes on with the program's, so that a difference is seen
where it is made and not again behind it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, fx

from sqakd_fx.ir import meta
from sqakd_fx.quant.grid import decode
from sqakd_fx.quant.quantizer import Quantizer
from sqakd_fx.validation.parity import count_steps


def quantizers_met(lowered: fx.GraphModule, names: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Lowered node to the quantizer node of the trained graph that gives its codes, and the tensor's name."""
    found = {}
    for node in lowered.graph.nodes:
        quantizer = meta.quantizer_node(node)
        if quantizer is None:
            continue
        source = node
        while source.name not in names:  # reshaped
            source = source.all_input_nodes[0]
        found[node.name] = (quantizer, names[source.name])
    return found


def _constant_nodes(graph: fx.Graph) -> set[fx.Node]:
    """What no input of the graph changes."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        is_stored = node.op == "get_attr"
        reads = node.all_input_nodes
        if is_stored or (node.op == "call_module" and reads and found.issuperset(reads)):
            found.add(node)
    return found


class Lockstep(fx.Interpreter):
    """Runs a trained graph from one of its quantizers to the next and counts what differs.

    `counts` has, for each name of a tensor, how many codes are how many steps off, over all batches. What no input
    changes, such as quantized weights, is computed once.
    """

    def __init__(self, student: fx.GraphModule) -> None:
        super().__init__(student)
        self.extra_traceback = False  # an error of ours is a sentence already
        self._constants = _constant_nodes(student.graph)
        self._kept: dict[fx.Node, Any] = {}
        self.counts: dict[str, Counter[int]] = {}
        self._left: Iterator[fx.Node] = iter(())

    def run_node(self, n: fx.Node) -> Any:
        if n not in self._constants:
            return super().run_node(n)
        if n not in self._kept:
            self._kept[n] = super().run_node(n)
        return self._kept[n]

    def begin(self, inputs: Sequence[Any]) -> None:
        """Start again at the first node; `inputs` are on the device of the graph."""
        self.env = {}
        self.args_iter = iter(inputs)
        self._left = iter(self.module.graph.nodes)  # type: ignore[union-attr, arg-type]

    def meet(self, quantizer_node: str, tensor: str, codes: Tensor) -> None:
        """Run to this quantizer and count how far its codes are from `codes` (uint8, same shape)."""
        for node in self._left:
            if node.name != quantizer_node:
                self._set(node, self.run_node(node))
                continue
            quantizer = cast(Quantizer, self.fetch_attr(str(node.target)))
            x: Tensor = self.env[cast(fx.Node, node.args[0])]
            own = quantizer.codes(x).cpu().numpy()
            count_steps(self.counts.setdefault(tensor, Counter()), own, codes.cpu().numpy())
            self._set(node, decode(codes.to(x.device), quantizer.grid()))
            return
        raise AssertionError(f"the trained graph has no quantizer {quantizer_node} behind the last")

    def finish(self) -> Any:
        """Run what is left, and give what the graph returns."""
        value = None
        for node in self._left:
            value = self.run_node(node)
            self._set(node, value)
        return value

    def _set(self, node: fx.Node, value: Any) -> None:
        self.env[node] = value
        for unused in self.user_to_last_uses.get(node, ()):
            del self.env[unused]
