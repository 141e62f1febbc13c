"""How δ and μ of the backward change during training.

    μ(t)  grows from 0 to the recipe's mu over the steps: evenly, or along half a cosine
    δ     = max(0, mean over batches of  tr(H)/N / (3 std(g)))      (EWGS, section 3.3)

H and g are the loss's Hessian and gradient in a quantizer's N outputs, in units of its whole range, as the
backward has them. The trace is Hutchinson's: E[vᵀHv] over signs v, with Hv the central difference of two
gradients. One v perturbs all quantizers together, since the signs of two are independent, so that a batch
takes two forwards and two backwards however many layers there are.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sqakd_fx.ir.modes import evaluation_mode
from sqakd_fx.quant.grid import along_axis
from sqakd_fx.quant.quantizer import Quantizer, quantizers_of
from sqakd_fx.recipe.keys import Recipe
from sqakd_fx.training.features import TrainingPair

_BATCHES = 3
_SHARE_OF_STEP = 0.125
"""How far outputs are moved for a difference, in steps of their grid."""


def mu_factor(recipe: Recipe, step: int, total: int) -> float:
    """Share of the recipe's mu at a step: 0 at the first and 1 at the last, or 1 where it is constant."""
    if recipe.mu_schedule == "constant":
        return 1.0
    done = step / max(total - 1, 1)
    return done if recipe.mu_schedule == "linear" else 0.5 * (1 - math.cos(math.pi * done))


def scheduled_mu(student: nn.Module, recipe: Recipe) -> Callable[[int, int], None]:
    """What sets μ of all quantizers to that of a step."""
    values = [q.mu for q in quantizers_of(student).values()]

    @torch.no_grad()
    def set_mu(step: int, total: int) -> None:
        torch._foreach_zero_(values)
        torch._foreach_add_(values, recipe.mu * mu_factor(recipe, step, total))

    return set_mu


def refreshed_delta(
    student: nn.Module,
    pair: TrainingPair,
    recipe: Recipe,
    batches: Callable[[], Iterable[tuple[Tensor, ...]]],
    every: int,
) -> Callable[[int, int], None]:
    """What sets δ of every quantizer from the Hessian's trace, each `every` steps.

    `pair` is what is trained, on one device; `batches` gives tuples of model inputs there, the same ones
    every time. Between refreshes δ stays in the student's buffers, and with them in its checkpoints.
    """
    for quantizer in quantizers_of(student).values():
        quantizer.modulated = True

    @torch.no_grad()
    def refresh(step: int, total: int) -> None:
        if step and step % every == 0:
            seed = recipe.seed * 1_000_003 + step
            few = itertools.islice(batches(), _BATCHES)
            for name, value in hessian_deltas(student, pair, few, seed).items():
                student.get_submodule(name).delta.copy_(value)  # type: ignore[operator, union-attr]

    return refresh


def hessian_deltas(
    student: nn.Module, pair: TrainingPair, batches: Iterable[tuple[Tensor, ...]], seed: int
) -> dict[str, Tensor]:
    """δ by quantizer: float32 scalars on the device, 0 where the gradient or the curvature gives none.

    The student runs in evaluation mode, so that neither its statistics nor any random number is drawn.
    """
    ratios: dict[str, list[Tensor]] = {name: [] for name in quantizers_of(student)}
    with evaluation_mode(student):
        for index, inputs in enumerate(batches):
            ahead = _gradients(student, pair, inputs, seed + index, _SHARE_OF_STEP)
            behind = _gradients(student, pair, inputs, seed + index, -_SHARE_OF_STEP)
            for name, calls in ahead.items():
                for (sign, length, g), (_, _, h) in zip(calls, behind[name]):
                    ratios[name].append(_ratio(sign, length, g, h))
    return {name: torch.stack(found).mean().clamp_min(0) for name, found in ratios.items() if found}


def _ratio(sign: Tensor, length: float, ahead: Tensor, behind: Tensor) -> Tensor:
    """tr(H)/N / (3 std(g)) of one tensor, from its gradients at ± length · sign.

    0 where g does not vary by more than what float32 rounds away from the two gradients.
    """
    trace = (sign * (ahead - behind)).mean() / (2 * length)
    spread = ((ahead + behind) / 2).std(correction=0)
    rounded_away = torch.maximum(ahead.abs().amax(), behind.abs().amax()) * 1e-5
    ratio = torch.where(spread > rounded_away, trace / (3 * spread), 0.0)
    return torch.nan_to_num(ratio, nan=0.0, posinf=0.0, neginf=0.0)


_Call = tuple[Tensor, float, Tensor]
"""The signs, how far they reach in units of the range, and the gradient in those units."""


def _gradients(
    student: nn.Module, pair: TrainingPair, inputs: tuple[Tensor, ...], seed: int, steps: float
) -> dict[str, list[_Call]]:
    """Gradients in every quantizer's output, moved by `steps` steps of its grid along random signs."""
    probes: list[tuple[str, Tensor, float, Tensor]] = []
    generator = torch.Generator().manual_seed(seed)

    def move(name: str) -> Callable[[Quantizer, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(quantizer: Quantizer, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            sign = torch.randint(0, 2, output.shape, generator=generator).to(output) * 2 - 1
            scale = along_axis(
                quantizer.interval(args[0].float()).scale_out.detach(), quantizer.axis, output.ndim
            )
            length = steps / quantizer.levels.span
            probe = (length * sign).requires_grad_()
            probes.append((name, sign, abs(length), probe))
            return output + probe * (scale * quantizer.levels.span)

        return hook

    with torch.no_grad():
        target = pair.teacher(*inputs)
    with torch.enable_grad():
        with _hooked(student, move):
            output = _uncompiled(pair.student)(*inputs)
        loss = _uncompiled(pair.loss)(output, target)
        found = torch.autograd.grad(loss, [p[-1] for p in probes], allow_unused=True)
    by_name: dict[str, list[_Call]] = {}
    for (name, sign, length, probe), g in zip(probes, found):
        gradient = torch.zeros_like(probe) if g is None else g
        by_name.setdefault(name, []).append((sign, length, gradient.detach()))
    return by_name


@contextmanager
def _hooked(student: nn.Module, hook_of: Callable[[str], Any]) -> Iterator[None]:
    handles = [
        quantizer.register_forward_hook(hook_of(name))
        for name, quantizer in quantizers_of(student).items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _uncompiled(part: Callable[..., Any]) -> Callable[..., Any]:
    return part.forward if isinstance(part, nn.Module) else part
