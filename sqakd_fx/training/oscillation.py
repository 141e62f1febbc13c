"""Freezing of weights that swing between two codes (Nagel 2022, section 4.3).

    o = [the code changed, and in the other direction than its last change]
    f ← m f + (1 - m) o          how often a weight swings
    a ← m a + (1 - m) code       where it is on average

A weight whose f exceeds the threshold is held at round(a), in units of its scale, for the rest of the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from sqakd_fx.errors import RecipeError
from sqakd_fx.ir.rewriting import constant_of
from sqakd_fx.quant.grid import along_axis
from sqakd_fx.quant.quantizer import Quantizer
from sqakd_fx.recipe.keys import Recipe

_MEMORY = 0.99


@dataclass(frozen=True)
class _Watched:
    """A weight (any shape) and what is remembered of its codes; all tensors have its shape."""

    weight: Tensor
    quantizer: Quantizer
    code: Tensor
    direction: Tensor
    frequency: Tensor
    average: Tensor
    frozen: Tensor

    def memory(self) -> dict[str, Tensor]:
        return {
            name: getattr(self, name)
            for name in ("code", "direction", "frequency", "average", "frozen")
        }


class OscillationFreezing:
    """Watches all quantized weights from `recipe.freeze_from` of the steps on; a `Callback`.

    Raises:
        RecipeError: a weight's family transforms weights before it rounds them (DoReFa, PACT, QIL, EWGS).
    """

    name = "freeze_oscillations"

    def __init__(self, student: fx.GraphModule, recipe: Recipe) -> None:
        self.recipe = recipe
        self.watched: dict[str, _Watched] = {}
        modules = dict(student.named_modules())
        for node in student.graph.nodes:
            module = modules.get(str(node.target)) if node.op == "call_module" else None
            if not isinstance(module, Quantizer) or module.role != "weight":
                continue
            weight = constant_of(student, node.args[0])
            if not isinstance(weight, torch.nn.Parameter):
                continue
            at = module.interval(weight)
            if at.scale_in is not at.scale_out:
                raise RecipeError(
                    f"freeze_oscillations needs weights that are rounded as they are, and "
                    f"weight_family = {module.family.name!r} transforms them: use lsq, lsq+, minmax, "
                    "percentile or sawb"
                )
            self.watched[str(node.target)] = _watch(weight, module)

    @torch.no_grad()
    def before_step(self, step: int, total: int) -> bool:
        if step == int(self.recipe.freeze_from * total):
            for one in self.watched.values():
                now = one.quantizer.discretized(one.weight)
                one.code.copy_(now)
                one.average.copy_(now)
        return False

    @torch.no_grad()
    def after_step(self, step: int, total: int) -> None:
        if step < int(self.recipe.freeze_from * total):
            return
        for one in self.watched.values():
            now = one.quantizer.discretized(one.weight)
            change = torch.sign(now - one.code)
            swings = (change != 0) & (change == -one.direction)
            one.frequency.lerp_(swings.float(), 1 - _MEMORY)
            one.average.lerp_(now, 1 - _MEMORY)
            one.direction.copy_(torch.where(change != 0, change, one.direction))
            one.code.copy_(now)
            caught = one.frozen.isnan() & (one.frequency > self.recipe.freeze_oscillations)
            one.frozen.copy_(torch.where(caught, torch.round(one.average), one.frozen))
            at = one.quantizer.interval(one.weight)
            scale = along_axis(at.scale_in, one.quantizer.axis, one.weight.ndim)
            offset = along_axis(at.offset, one.quantizer.axis, one.weight.ndim)
            one.weight.copy_(
                torch.where(one.frozen.isnan(), one.weight, (one.frozen - offset) * scale)
            )

    def finish(self) -> None: ...

    def tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": value
            for name, one in self.watched.items()
            for key, value in one.memory().items()
        }

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, value in self.tensors().items():
            value.copy_(tensors[name])


def _watch(weight: Tensor, quantizer: Quantizer) -> _Watched:
    code, direction, frequency, average = (torch.zeros_like(weight.detach()) for _ in range(4))
    frozen = torch.full_like(weight.detach(), float("nan"))
    return _Watched(weight, quantizer, code, direction, frequency, average, frozen)
