"""Call an activation function that is spelt as sums and products by its name.

    Before:  y = x * relu6(x + 3) / 6                               After:  y = F.hardswish(x)
    Before:  y = clamp(x + 3, 0, 6) / 6                             After:  y = F.hardsigmoid(x)
    Before:  y = x * sigmoid(x)                                     After:  y = F.silu(x)
    Before:  y = 0.5 * x * (1 + erf(x / sqrt(2)))                   After:  y = F.gelu(x)
    Before:  y = 0.5 * x * (1 + tanh(sqrt(2/pi) * (x + 0.044715 * x ** 3)))
    After:   y = F.gelu(x, approximate="tanh")

Importers and older models spell them so. A named function has one grid in front and one behind it; parts have one each.
Hard-swish: Howard et al., arXiv 1905.02244, section 5.2. GELU: Hendrycks and Gimpel, arXiv 1606.08415, section 2.
SiLU: Elfwing et al., arXiv 1702.03118, equation 13.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from sqakd_fx.ir.op_table import Kind, op_of, shape_of
from sqakd_fx.ir.pass_manager import Pass, PassResult
from sqakd_fx.ir.rewriting import constant_of, drop_unused, replace_node

_CUBE = 0.044715
_MOST_FACTORS = 4


@dataclass(frozen=True)
class NameActivations(Pass):
    """Call an activation function that is spelt as sums and products by its name."""

    name = "name_activations"

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        spelling = _Spelling(graph_module, dict(graph_module.named_modules()))
        changed = False
        for node in reversed(list(graph_module.graph.nodes)):
            found = spelling.activation(node)
            if found is None:
                continue
            target, x, kwargs = found
            if _are_alike(node, x):
                changed = replace_node(graph_module, node, target, (x,), kwargs)
        changed = graph_module.graph.eliminate_dead_code() or changed
        drop_unused(graph_module)
        return PassResult(graph_module, changed)


def _are_alike(node: fx.Node, x: fx.Node) -> bool:
    known = [one.meta.get("tensor_meta") for one in (node, x)]
    dtypes = {getattr(one, "dtype", None) for one in known}
    shape = shape_of(node)
    return dtypes == {torch.float32} and shape is not None and shape == shape_of(x)


@dataclass(frozen=True)
class _Product:
    """A number times some tensors."""

    number: float
    tensors: tuple[fx.Node, ...]

    def without(self, number: float, x: fx.Node) -> fx.Node | None:
        """The other tensor, where this is `number * x * other`."""
        others = [one for one in self.tensors if one is not x]
        is_pair = len(self.tensors) == 2 and len(others) == 1
        return others[0] if is_pair and math.isclose(self.number, number, rel_tol=1e-4) else None

    def alone(self, number: float) -> fx.Node | None:
        """The tensor, where this is `number * tensor`."""
        is_alone = len(self.tensors) == 1 and math.isclose(self.number, number, rel_tol=1e-4)
        return self.tensors[0] if is_alone else None


@dataclass(frozen=True)
class _Spelling:
    """What the nodes of a graph say in sums and products."""

    graph_module: fx.GraphModule
    modules: Mapping[str, nn.Module]

    def activation(self, node: fx.Node) -> tuple[Any, fx.Node, Mapping[str, Any]] | None:
        """The function that `node` spells, its argument, and its other arguments by name."""
        if not self._multiplies(node):
            return None
        product = self._product(node)
        x = self._shifted_and_clipped(product.alone(1 / 6))
        if x is not None:
            return F.hardsigmoid, x, {}
        for x in product.tensors[:2] if len(product.tensors) == 2 else ():
            if self._sigmoid(product.without(1.0, x)) is x:
                return F.silu, x, {}
            if self._gated(product.without(1.0, x)) is x:
                return F.hardswish, x, {}
            if self._shifted_and_clipped(product.without(1 / 6, x)) is x:
                return F.hardswish, x, {}
            approximation = self._gelu(self._plus(product.without(0.5, x), 1.0), x)
            if approximation is not None:
                return F.gelu, x, approximation
        return None

    def _gated(self, node: fx.Node | None) -> fx.Node | None:
        """x, where `node` is a hard-sigmoid of x by either spelling."""
        if node is None:
            return None
        if node.target is F.hardsigmoid:
            x = node.args[0]
            return x if isinstance(x, fx.Node) else None
        return self._shifted_and_clipped(self._product(node).alone(1 / 6))

    def _sigmoid(self, node: fx.Node | None) -> fx.Node | None:
        """x, where `node` is the sigmoid of x that nobody else reads."""
        if node is None or len(node.users) > 1:
            return None
        op = op_of(node, self.modules)
        x = node.args[0] if op is not None and op.is_silu_gate else None
        return x if isinstance(x, fx.Node) and len(node.args) == 1 and not node.kwargs else None

    def _multiplies(self, node: Any) -> bool:
        op = (
            op_of(node, self.modules)
            if isinstance(node, fx.Node) and node.op == "call_function"
            else None
        )
        takes_two = op is not None and len(node.args) == 2 and not node.kwargs
        return op is not None and takes_two and (op.kind is Kind.PRODUCT or op.divides)

    def _product(self, node: fx.Node) -> _Product:
        """The factors of a node, through products and quotients that nobody else reads."""
        number, tensors, left = 1.0, list[fx.Node](), [node]
        while left:
            one = left.pop()
            is_factor = one is not node and len(one.users) > 1
            if is_factor or not self._multiplies(one) or len(tensors) + len(left) > _MOST_FACTORS:
                tensors.append(one)
                continue
            op, (a, b) = op_of(one, self.modules), one.args
            divisor = self._number(b) if op is not None and op.divides else None
            if op is not None and op.divides and not divisor:
                tensors.append(one)
                continue
            for side, value in ((a, self._number(a)), (b, self._number(b))):
                if value is None:
                    left.append(side)  # type: ignore[arg-type]
                else:
                    number *= 1 / value if divisor and side is b else value
        return _Product(number, tuple(tensors))

    def _plus(self, node: fx.Node | None, wanted: float) -> fx.Node | None:
        """x, where `node` is x + wanted in either order."""
        op = op_of(node, self.modules) if node is not None and node.op == "call_function" else None
        if node is None or op is None or op.kind is not Kind.SUM or node.kwargs:
            return None
        orders = (node.args,) if op.is_difference else (node.args, node.args[::-1])
        for x, other in orders:
            if self._number(other) == (-wanted if op.is_difference else wanted):
                return x if isinstance(x, fx.Node) else None
        return None

    def _shifted_and_clipped(self, node: fx.Node | None) -> fx.Node | None:
        """x, where `node` is min(max(x + 3, 0), 6)."""
        op = op_of(node, self.modules) if node is not None else None
        if node is None or op is None or op.kind is not Kind.CLIP or node.kwargs:
            return None
        bounds = op.bounds or tuple(self._number(bound) for bound in node.args[1:])
        source = node.args[0]
        return (
            self._plus(source, 3.0)
            if bounds == (0.0, 6.0) and isinstance(source, fx.Node)
            else None
        )

    def _gelu(self, node: fx.Node | None, x: fx.Node) -> Mapping[str, Any] | None:
        """Other arguments of the GELU of x, where `node` is the function in its gate."""
        op = op_of(node, self.modules) if node is not None else None
        if node is None or op is None or op.gelu is None or len(node.args) != 1 or node.kwargs:
            return None
        approximate, number = op.gelu
        inside = node.args[0]
        y = self._product(inside).alone(number) if isinstance(inside, fx.Node) else None
        if approximate == "none":
            return {} if y is x else None
        return {"approximate": approximate} if self._cubic(y) is x else None

    def _cubic(self, node: fx.Node | None) -> fx.Node | None:
        """x, where `node` is x + 0.044715 x³."""
        op = op_of(node, self.modules) if node is not None else None
        if node is None or op is None or op.kind is not Kind.SUM or op.is_difference or node.kwargs:
            return None
        for x, other in (node.args, node.args[::-1]):
            if isinstance(x, fx.Node) and isinstance(other, fx.Node) and self._is_cube(other, x):
                return x
        return None

    def _is_cube(self, node: fx.Node, x: fx.Node) -> bool:
        product = self._product(node)
        if product.tensors == (x, x, x):
            return math.isclose(product.number, _CUBE, rel_tol=1e-4)
        power = product.alone(_CUBE)
        op = op_of(power, self.modules) if power is not None else None
        if power is None or op is None or not op.squares or power.kwargs or len(power.args) != 2:
            return False
        return power.args[0] is x and self._number(power.args[1]) == 3

    def _number(self, value: Any) -> float | None:
        """A Python number, or a constant tensor of one element."""
        if isinstance(value, int | float):
            return float(value)
        constant = constant_of(self.graph_module, value)
        return constant.item() if constant is not None and constant.numel() == 1 else None
