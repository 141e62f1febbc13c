"""When a run ends: after its last step, or where agreement on held-out samples no longer grows."""

from __future__ import annotations

from torch import fx

from sqakd_fx.engine.distributed import is_first
from sqakd_fx.training.held_out import HeldOut
from sqakd_fx.training.state import TrainingState
from sqakd_fx.training.step_batches import StepBatches


class Ending:
    """Decides from the state alone, so that a resumed run ends where the uninterrupted one does.

    `agreement` is the last one measured.
    """

    def __init__(self, batches: StepBatches, held_out: HeldOut | None) -> None:
        self.held_out = held_out
        self.early_stop = None if held_out is None else batches.recipe.early_stop
        self.steps_per_epoch, self.total = batches.steps_per_epoch, batches.total
        self.agreement: float | None = None

    def decides_at(self, step: int) -> bool:
        """Whether early stopping looks at the agreement behind this step."""
        return self.early_stop is not None and step % self.steps_per_epoch == 0

    def is_reached(self, state: TrainingState) -> bool:
        return state.step >= self.total or (
            self.early_stop is not None
            and self.decides_at(state.step)
            and state.step - state.best_step >= self.early_stop * self.steps_per_epoch
        )

    def measured(self, state: TrainingState, student: fx.GraphModule) -> float | None:
        """Agreement where early stopping needs it, at the end, and else where it costs little."""
        if self.held_out is None:
            return None
        decides = self.decides_at(state.step)
        last = state.step == self.total
        if not (decides or (is_first() and (last or self.held_out.is_affordable))):
            return None
        self.agreement = self.held_out.agreement(student)
        if decides and self.agreement > state.best_agreement:
            state.best_agreement, state.best_step = self.agreement, state.step
        return self.agreement
