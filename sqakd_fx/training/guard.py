"""Whether training helped: the student on the same unlabelled samples before its first step and behind its last."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from sqakd_fx.diagnostics.batch_errors import batch_named
from sqakd_fx.errors import TrainingError
from sqakd_fx.ir.batches import moved
from sqakd_fx.ir.outputs import tensors_of
from sqakd_fx.recipe import Recipe
from sqakd_fx.training.held_out import agreement
from sqakd_fx.training.losses import distillation_loss

_ERRORS = 2.0
"""Standard errors by which an agreement must fall to be lower."""
_DESTROYED = 0.5
"""Share of the agreement before training below which nothing was learned."""
_CONSTANT = 1e-6


@dataclass(frozen=True)
class Judged:
    """A student on unlabelled samples.

    Attributes:
        agreement: mean over the outputs: the share of the teacher's predictions that it gives, or for outputs
            without classes 1 - squared error over the teacher's variance.
        loss: the recipe's.
        is_constant: true where it gives one output for all samples and the teacher does not.
        samples: how many.
    """

    agreement: float
    loss: float
    is_constant: bool
    samples: int

    @property
    def standard_error(self) -> float:
        """Of the agreement, as if each sample decided once."""
        share = min(max(self.agreement, 0.0), 1.0)
        return math.sqrt(share * (1 - share) / max(self.samples, 1))


class Judge:
    """Judges students on `batches`, on the device where they lie."""

    def __init__(
        self,
        batches: Iterable[tuple[Tensor, ...]],
        teacher: nn.Module,
        recipe: Recipe,
        device: torch.device,
    ) -> None:
        self.recipe, self.loss = recipe, distillation_loss(recipe)
        self.batches = [moved(batch, device) for batch in batches]
        self.targets = []
        for index, batch in enumerate(self.batches):
            with batch_named(f"batch {index} of the samples to judge on", batch), torch.no_grad():
                self.targets.append(teacher(*batch))

    @torch.no_grad()
    def __call__(self, student: fx.GraphModule) -> Judged:
        """The student in evaluation mode; it comes back in the mode that it had."""
        was_training = student.training
        student.eval()
        given = [student.forward(*batch) for batch in self.batches]
        student.train(was_training)
        pairs = list(zip(given, self.targets, strict=True))
        shares = [agreement(ours, theirs, self.recipe) for ours, theirs in pairs]
        losses = [self.loss(ours, theirs) for ours, theirs in pairs]
        return Judged(
            float(torch.stack(shares).mean()),
            float(torch.stack(losses).mean()),
            _is_constant(given, self.targets),
            sum(len(batch[0]) for batch in self.batches),
        )


def _is_constant(given: Sequence[Any], wanted: Sequence[Any]) -> bool:
    """Whether a student gives all samples the same, in every output in which the teacher does not."""
    ours, theirs = (list(zip(*map(tensors_of, side), strict=True)) for side in (given, wanted))
    varied = [a for a, b in zip(ours, theirs, strict=True) if not _are_the_same(b)]
    return bool(varied) and all(map(_are_the_same, varied))


def _are_the_same(parts: Sequence[Tensor]) -> bool:
    """Whether every sample of all batches has the values of the first one, to float32 rounding."""
    parts = [part for part in parts if part.numel()]
    if not parts or not parts[0].ndim:
        return True
    if len({part.shape[1:] for part in parts}) > 1:
        return False
    first = parts[0][:1].float()
    largest = max(float(part.float().abs().max()) for part in parts)
    return all(float((part.float() - first).abs().max()) <= _CONSTANT * largest for part in parts)


def refuse_destroyed(before: Judged, after: Judged, recipe: Recipe) -> None:
    """Raises TrainingError where training left a constant student, or far less than calibration gave.

    Labels may lead away from the teacher: with them only a constant student is refused.
    """
    rates = (
        f"lower learning_rate ({recipe.learning_rate:g}) or "
        f"quantizer_learning_rate ({recipe.quantizer_learning_rate:g})"
    )
    if after.is_constant:
        way_out = "take more bits" if before.is_constant else rates
        raise TrainingError(
            f"the trained student gives one constant output for all {after.samples} samples that it is judged on: "
            f"{way_out}"
        )
    if recipe.labels:
        return
    if not after.agreement >= _DESTROYED * before.agreement and not _lost(before, after) <= 0:
        raise TrainingError(
            f"training destroyed the student ({figures(before, after)}): {rates}, or set steps = 0 for the "
            "calibrated student"
        )


def has_lost(before: Judged, after: Judged) -> bool:
    """Whether the calibrated student was nearer to the teacher: beyond noise, or by agreement and loss alike."""
    lost = before.agreement - after.agreement
    return _lost(before, after) > 0 or (lost > 0 and after.loss > before.loss)


def _lost(before: Judged, after: Judged) -> float:
    """Agreement lost beyond noise."""
    noise = math.hypot(before.standard_error, after.standard_error)
    return before.agreement - after.agreement - _ERRORS * noise


def figures(before: Judged, after: Judged) -> str:
    """Both agreements in words."""
    return (
        f"agreement with the float model on {after.samples} unlabelled samples is {before.agreement:.2%} before "
        f"training and {after.agreement:.2%} behind it"
    )


def copied_state(student: nn.Module) -> Mapping[str, Tensor]:
    """A copy of all tensors, on the CPU."""
    return {name: x.detach().to("cpu", copy=True) for name, x in student.state_dict().items()}
