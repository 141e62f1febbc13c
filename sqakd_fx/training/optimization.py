"""One step of training: rates, callbacks, the gradient of a batch, and the optimizer's update."""

from __future__ import annotations

from torch import Tensor

from sqakd_fx.diagnostics.batch_errors import batch_named
from sqakd_fx.diagnostics.wording import no_effect
from sqakd_fx.training.mixing import can_mix, mixed
from sqakd_fx.training.optimizer import schedule, set_rates
from sqakd_fx.training.progress import Reporter
from sqakd_fx.training.state import TrainingState
from sqakd_fx.training.step import GradientStep
from sqakd_fx.training.step_batches import StepBatches


class OptimizationStep:
    """Called with the batch of the state's next step, it moves the state on and returns the detached loss."""

    def __init__(
        self,
        state: TrainingState,
        gradient: GradientStep,
        batches: StepBatches,
        reporter: Reporter,
    ) -> None:
        self.state, self.gradient = state, gradient
        self.batches, self.reporter = batches, reporter

    def __call__(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Raises SourceError where the model does not take the batch."""
        state, total = self.state, self.batches.total
        factor = state.rate_factor * schedule(self.batches.recipe, state.step, total)
        set_rates(state.optimizer, factor)
        for callback in state.callbacks:
            if callback.before_step(state.step, total):
                state.opening_loss = None
                self.gradient.forget_recording()
        inputs = self._mixed(inputs)
        steps_per_epoch = self.batches.steps_per_epoch
        if self.gradient.cache is not None:
            self.gradient.cache.expect((steps_per_epoch + 1) * len(inputs[0]))
        epoch, index = divmod(state.step, steps_per_epoch)
        with batch_named(f"batch {index} of epoch {epoch} of the data", inputs):
            loss = self.gradient(inputs)
        state.optimizer.step()
        for callback in state.callbacks:
            callback.after_step(state.step, total)
        state.step += 1
        return loss

    def _mixed(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        recipe = self.batches.recipe
        if recipe.mixing == "none":
            return inputs
        if recipe.labels or not can_mix(inputs):
            why = "a mixture has no label" if recipe.labels else "the inputs are not images"
            self.reporter.note_once(no_effect("mixing", why))
            return inputs
        return mixed(inputs, recipe, self.state.step)
