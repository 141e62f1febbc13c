"""The state of a training run: saved, restored, and rolled back where the loss diverges."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from sqakd_fx.engine.distributed import any_process, is_everywhere, is_first
from sqakd_fx.errors import StorageError, TrainingError
from sqakd_fx.ir.batches import moved
from sqakd_fx.quant.quantizer import quantizers_of
from sqakd_fx.recipe.keys import Recipe
from sqakd_fx.training.beginning import OTHER_RUN, Beginning, require_same_run
from sqakd_fx.training.callbacks import Callback
from sqakd_fx.training.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    pack_optimizer,
    save_checkpoint,
    unpack_optimizer,
)

_ROLLBACKS = 3
_BEGINNING = "beginning"
"""Under which a checkpoint's state has what the run began with."""


@dataclass
class TrainingState:
    """Everything that a step changes."""

    student: fx.GraphModule
    optimizer: torch.optim.Optimizer
    callbacks: Sequence[Callback]
    step: int = 0
    rate_factor: float = 1.0
    rollbacks: int = 0
    opening_loss: float | None = None
    best_agreement: float = -math.inf
    best_step: int = 0

    def pack(self) -> Checkpoint:
        """A copy."""
        tensors = {f"student.{k}": v for k, v in self.student.state_dict().items()}
        packed, values = pack_optimizer(self.optimizer)
        tensors |= {f"optimizer.{k}": v for k, v in packed.items()}
        for index, callback in enumerate(self.callbacks):
            tensors |= {f"callback.{index}.{k}": v for k, v in callback.tensors().items()}
        return Checkpoint(
            self.step,
            {name: tensor.detach().clone() for name, tensor in tensors.items()},
            {
                "optimizer": values,
                "rate_factor": self.rate_factor,
                "rollbacks": self.rollbacks,
                "opening_loss": self.opening_loss,
                "best_agreement": None if self.best_step == 0 else self.best_agreement,
                "best_step": self.best_step,
                "callback": [callback.name for callback in self.callbacks],
            },
        )

    def unpack(self, checkpoint: Checkpoint) -> None:
        """Become what `checkpoint` holds; raises TrainingError where it is of another run."""
        if checkpoint.state.get("callback") != [callback.name for callback in self.callbacks]:
            raise TrainingError(OTHER_RUN)
        try:
            self._unpack(checkpoint)
        except (RuntimeError, KeyError, TypeError, ValueError, IndexError) as error:
            raise TrainingError(OTHER_RUN) from error

    def _unpack(self, checkpoint: Checkpoint) -> None:
        self.student.load_state_dict(_part(checkpoint, "student."))
        unpack_optimizer(
            self.optimizer, _part(checkpoint, "optimizer."), checkpoint.state["optimizer"]
        )
        for index, callback in enumerate(self.callbacks):
            callback.load(_part(checkpoint, f"callback.{index}."))
        for quantizer in quantizers_of(self.student).values():
            quantizer.enabled = True
        self.step = checkpoint.step
        self.rate_factor = float(checkpoint.state["rate_factor"])
        self.rollbacks = int(checkpoint.state["rollbacks"])
        self.opening_loss = checkpoint.state["opening_loss"]
        self.best_step = int(checkpoint.state["best_step"])
        best = checkpoint.state["best_agreement"]
        self.best_agreement = -math.inf if best is None else float(best)


def _part(checkpoint: Checkpoint, prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in checkpoint.tensors.items()
        if name.startswith(prefix)
    }


class Recovery:
    """Keeps the last good state of a run, in memory and in `folder` where there is one.

    `beginning` is what the run began with, where there is a folder. `before_saving` is called before a checkpoint is
    written.
    """

    def __init__(
        self,
        state: TrainingState,
        recipe: Recipe,
        folder: Path | None,
        device: torch.device,
        beginning: Beginning | None,
        on_note: Callable[[str], None],
        before_saving: Callable[[], None] = lambda: None,
    ) -> None:
        self.state, self.recipe, self.folder = state, recipe, folder
        self.beginning = beginning
        self.device, self.on_note = device, on_note
        self.last_good = state.pack()
        self.saved_at = time.monotonic()
        self.paused = False
        self.before_saving = before_saving

    @property
    def saves(self) -> bool:
        """Whether the last save reached the disk."""
        return self.folder is not None and not self.paused

    def restore_latest(self, total: int) -> None:
        """Go on from the newest undamaged checkpoint of the folder.

        Raises:
            TrainingError: it is of another run, or not all processes see it.
        """
        assert self.folder is not None
        assert self.beginning is not None
        checkpoint, notes = latest_checkpoint(self.folder)
        for text in notes:
            self.on_note(text)
        if not is_everywhere(0 if checkpoint is None else checkpoint.step, self.device):
            raise TrainingError(
                f"the machines of this run do not see the same checkpoints in {self.folder}: give --out on a disk that "
                "all of them read, or start again without --resume"
            )
        if checkpoint is None:
            self.on_note("there is no checkpoint to resume from: training starts at step 0")
            return
        told = require_same_run(checkpoint.state.get(_BEGINNING), self.beginning)
        if told is not None:
            self.on_note(told)
        self.state.unpack(checkpoint)
        self.last_good = self.state.pack()
        self.on_note(f"resumed at step {self.state.step} of {total}")

    def is_due_by_step(self) -> bool:
        """Whether the recipe asks for a checkpoint at this step; equal in all processes."""
        every = self.recipe.checkpoint_steps
        return every is not None and self.state.step % every == 0

    def save_if_due(self, *, force: bool) -> None:
        """Keep the present state, which must be good, where time or step say so."""
        due = time.monotonic() - self.saved_at >= self.recipe.checkpoint_seconds
        if not any_process(due or force or self.is_due_by_step(), self.device):
            return
        self.last_good = self.state.pack()
        self.saved_at = time.monotonic()
        if self.folder is None or not is_first():
            return
        self.before_saving()
        try:
            state = self.last_good.state | {_BEGINNING: self.beginning}
            save_checkpoint(self.folder, replace(self.last_good, state=state))
            self.paused = False
        except StorageError as error:
            if not self.paused:
                self.on_note(f"checkpoints pause: {error}")
            self.paused = True

    def roll_back(self, inputs: tuple[Tensor, ...]) -> None:
        """Return to the last good state at half the learning rate; `inputs` are the last batch.

        Raises:
            TrainingError: it is the fourth time; names the layer where values blew up.
        """
        state = self.state
        rollbacks, factor = state.rollbacks + 1, state.rate_factor
        inputs = moved(inputs, self.device)
        now = quantizer_inputs(state.student, inputs)
        state.unpack(self.last_good)
        good = quantizer_inputs(state.student, inputs)
        state.unpack(self.last_good)  # running the student moved its BatchNorm statistics
        where = blown_up(now, good)
        if rollbacks > _ROLLBACKS:
            raise TrainingError(
                f"the loss diverges, also at {factor:g} times the learning rate; values blow up in "
                f"front of {where}: lower learning_rate or raise the bits there",
                node=where,
            )
        state.rollbacks, state.rate_factor = rollbacks, factor * 0.5
        self.on_note(
            f"the loss diverged (values blow up in front of {where}): back to step {state.step}, "
            f"learning rate times {state.rate_factor:g}"
        )


@torch.no_grad()
def quantizer_inputs(student: fx.GraphModule, inputs: tuple[Tensor, ...]) -> dict[str, float]:
    """The largest magnitude that reaches each quantizer, in the order in which they run."""
    seen: dict[str, Tensor] = {}

    def record(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: seen.update({name: args[0].detach().abs().amax()})

    handles = [
        quantizer.register_forward_pre_hook(record(name))
        for name, quantizer in quantizers_of(student).items()
    ]
    try:
        student.forward(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: float(largest) for name, largest in seen.items()}


def blown_up(now: Mapping[str, float], good: Mapping[str, float]) -> str:
    """The first quantizer that a value which is not finite reaches, or whose input grew most."""
    for name, largest in now.items():
        if not math.isfinite(largest):
            return name
    return max(
        now, key=lambda name: now[name] / max(good.get(name, 0.0), 1e-30), default="the loss"
    )
