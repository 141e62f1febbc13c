"""Whether training helped: the student on the same unlabelled samples before its first step and behind its last."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from sqakd_fx.diagnostics.batch_errors import batch_named
from sqakd_fx.errors import TrainingError
from sqakd_fx.ir.batches import moved
from sqakd_fx.ir.modes import evaluation_mode
from sqakd_fx.ir.outputs import tensors_of
from sqakd_fx.recipe.keys import Recipe
from sqakd_fx.training.held_out import agreement
from sqakd_fx.training.losses import distillation_loss

_ERRORS = 2.0
"""Standard errors by which an agreement must fall to be lower."""
_DESTROYED = 0.5
"""Share of the agreement before training below which nothing was learned."""
_CONSTANT = 1e-6
"""Differences between samples, of the largest value, that are float32 rounding."""
_TELLING = 1e-3
"""Differences of the teacher's, of its largest value, that codes can show: a quarter of a step of 8 bits."""


@dataclass(frozen=True)
class Judged:
    """A student on unlabelled samples.

    Attributes:
        agreement: mean over the outputs: the share of the teacher's predictions that it gives, or for outputs
            without classes 1 - squared error over the teacher's variance.
        loss: the recipe's.
        is_constant: true where it gives one output for all samples and the teacher's differ enough to be seen in codes.
        samples: how many.
        largest: the largest output of the teacher.
    """

    agreement: float
    loss: float
    is_constant: bool
    samples: int
    largest: float = math.inf

    @property
    def standard_error(self) -> float:
        """Of the agreement, as if each sample decided once, with one more on either side: few prove little."""
        samples = max(self.samples, 1)
        share = (min(max(self.agreement, 0.0), 1.0) * samples + 1) / (samples + 2)
        return math.sqrt(share * (1 - share) / samples)


class Judge:
    """Judges students beside `teacher` on `batches`, on the device where both lie; one batch's outputs are held."""

    def __init__(
        self,
        batches: Iterable[tuple[Tensor, ...]],
        teacher: nn.Module,
        recipe: Recipe,
        device: torch.device,
    ) -> None:
        self.recipe, self.loss, self.teacher = recipe, distillation_loss(recipe), teacher
        self.batches = [moved(batch, device) for batch in batches]

    @torch.no_grad()
    def __call__(self, student: fx.GraphModule) -> Judged:
        """The student in evaluation mode; it comes back in the mode that it had."""
        shares, losses = [], []
        ours, theirs = _Variation(_CONSTANT), _Variation(_TELLING)
        with evaluation_mode(student):
            for index, batch in enumerate(self.batches):
                with batch_named(f"batch {index} of the samples to judge on", batch):
                    given, wanted = student.forward(*batch), self.teacher(*batch)
                shares.append(agreement(given, wanted, self.recipe))
                losses.append(self.loss(given, wanted))
                ours.add(tensors_of(given))
                theirs.add(tensors_of(wanted))
        varied = [a for a, b in zip(ours.varies, theirs.varies, strict=True) if b]
        return Judged(
            float(torch.stack(shares).mean()),
            float(torch.stack(losses).mean()),
            bool(varied) and not any(varied),
            sum(len(batch[0]) for batch in self.batches),
            theirs.largest,
        )


class _Variation:
    """Whether any sample of any batch differs from the very first one by a `share` of its size, for each output.

    `largest` is the largest value of all.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.first: list[Tensor] = []
        self.varies: list[bool] = []
        self.largest = 0.0

    def add(self, outputs: Sequence[Tensor]) -> None:
        sizes = [float(x.abs().max()) for x in outputs if x.numel()]
        self.largest = max([self.largest, *sizes])
        if not self.first:
            self.first = [x[:1].float() if x.ndim else x.float() for x in outputs]
            self.varies = [False] * len(outputs)
        self.varies = [
            known or _differs(x.float(), first, self.share)
            for known, x, first in zip(self.varies, outputs, self.first, strict=True)
        ]


def _differs(x: Tensor, first: Tensor, share: float) -> bool:
    if not x.numel() or not x.ndim:
        return False
    if x.shape[1:] != first.shape[1:]:
        return True
    return not float((x - first).abs().max()) <= share * float(x.abs().max())


def refuse_destroyed(before: Judged, after: Judged, recipe: Recipe) -> None:
    """Raises TrainingError where training left a constant student, or far less than calibration gave and no lower loss.

    Labels may lead away from the teacher: with them only a constant student is refused.
    """
    rates = (
        f"lower learning_rate ({recipe.learning_rate:g}) or "
        f"quantizer_learning_rate ({recipe.quantizer_learning_rate:g})"
    )
    if after.is_constant:
        way_out = "take more bits" if before.is_constant else rates
        if after.largest < recipe.learning_rate:
            way_out = (
                f"the float model's own outputs are at most {after.largest:.1g}, which one step of learning_rate "
                f"({recipe.learning_rate:g}) outweighs: load its trained weights, or set steps = 0 for the calibrated "
                "student"
            )
        raise TrainingError(
            f"the trained student gives one constant output for all {after.samples} samples that it is judged on: "
            f"{way_out}"
        )
    if recipe.labels:
        return
    fell = not after.agreement >= _DESTROYED * before.agreement and not _lost(before, after) <= 0
    if fell and not after.loss < before.loss:
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
        f"agreement with the float model on {after.samples} samples is {before.agreement:.2%} before "
        f"training and {after.agreement:.2%} behind it"
    )


def copied_state(student: nn.Module) -> Mapping[str, Tensor]:
    """A copy of all tensors, on the CPU."""
    return {name: x.detach().to("cpu", copy=True) for name, x in student.state_dict().items()}
