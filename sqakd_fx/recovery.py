"""The state of a training run: saved, restored, and rolled back where the loss diverges."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx

from sqakd_fx.calibrate import quantizers_of
from sqakd_fx.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    pack_optimizer,
    save_checkpoint,
    unpack_optimizer,
)
from sqakd_fx.craft import Craft
from sqakd_fx.distributed import any_process, is_first
from sqakd_fx.errors import StorageError, TrainingError
from sqakd_fx.recipe import Recipe

_ROLLBACKS = 3


@dataclass
class TrainingState:
    """Everything that a step changes."""

    student: fx.GraphModule
    optimizer: torch.optim.Optimizer
    craft: Sequence[Craft]
    step: int = 0
    rate_factor: float = 1.0
    rollbacks: int = 0

    def pack(self) -> Checkpoint:
        """A copy."""
        tensors = {f"student.{k}": v for k, v in self.student.state_dict().items()}
        packed, values = pack_optimizer(self.optimizer)
        tensors |= {f"optimizer.{k}": v for k, v in packed.items()}
        for index, craft in enumerate(self.craft):
            tensors |= {f"craft.{index}.{k}": v for k, v in craft.tensors().items()}
        return Checkpoint(
            self.step,
            {name: tensor.detach().clone() for name, tensor in tensors.items()},
            {
                "optimizer": values,
                "rate_factor": self.rate_factor,
                "rollbacks": self.rollbacks,
                "craft": [type(craft).__name__ for craft in self.craft],
            },
        )

    def unpack(self, checkpoint: Checkpoint) -> None:
        """Become what `checkpoint` holds; raises TrainingError where it is of another run."""
        if checkpoint.state["craft"] != [type(craft).__name__ for craft in self.craft]:
            raise TrainingError(_OTHER_RUN)
        try:
            self.student.load_state_dict(_part(checkpoint, "student."))
        except RuntimeError as error:
            raise TrainingError(_OTHER_RUN) from error
        unpack_optimizer(
            self.optimizer, _part(checkpoint, "optimizer."), checkpoint.state["optimizer"]
        )
        for index, craft in enumerate(self.craft):
            craft.load(_part(checkpoint, f"craft.{index}."))
        for quantizer in quantizers_of(self.student).values():
            quantizer.enabled = True
        self.step = checkpoint.step
        self.rate_factor = float(checkpoint.state["rate_factor"])
        self.rollbacks = int(checkpoint.state["rollbacks"])


_OTHER_RUN = "the checkpoint does not fit this model and recipe: start again without --resume"


def _part(checkpoint: Checkpoint, prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in checkpoint.tensors.items()
        if name.startswith(prefix)
    }


class Recovery:
    """Keeps the last good state of a run, in memory and in `folder` where there is one."""

    def __init__(
        self,
        state: TrainingState,
        recipe: Recipe,
        folder: Path | None,
        device: torch.device,
        on_note: Callable[[str], None],
    ) -> None:
        self.state, self.recipe, self.folder = state, recipe, folder
        self.device, self.on_note = device, on_note
        self.last_good = state.pack()
        self.saved_at = time.monotonic()
        self.paused = False

    @property
    def saves(self) -> bool:
        """Whether the last save reached the disk."""
        return self.folder is not None and not self.paused

    def restore_latest(self, total: int) -> None:
        """Go on from the newest undamaged checkpoint of the folder."""
        assert self.folder is not None
        checkpoint, notes = latest_checkpoint(self.folder)
        for text in notes:
            self.on_note(text)
        if checkpoint is None:
            self.on_note("there is no checkpoint to resume from: training starts at step 0")
            return
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
        try:
            save_checkpoint(self.folder, self.last_good)
            self.paused = False
        except StorageError as error:
            if not self.paused:
                self.on_note(f"checkpoints pause: {error}")
            self.paused = True

    def roll_back(self) -> None:
        """Return to the last good state at half the learning rate.

        Raises:
            TrainingError: it is the fourth time; names where the first value that is not finite stands.
        """
        rollbacks, factor = self.state.rollbacks + 1, self.state.rate_factor
        where = first_not_finite(self.state.student)
        if rollbacks > _ROLLBACKS:
            raise TrainingError(
                f"the loss is not finite, also at {factor:g} times the learning rate; "
                f"it starts in {where}: lower learning_rate or raise its bits",
                node=where,
            )
        self.state.unpack(self.last_good)
        self.state.rollbacks, self.state.rate_factor = rollbacks, factor * 0.5
        self.on_note(
            f"the loss was not finite (first in {where}): back to step {self.state.step}, "
            f"learning rate times {self.state.rate_factor:g}"
        )


def first_not_finite(student: fx.GraphModule) -> str:
    """The first parameter or buffer that is not finite, in graph order; "the loss" if none is."""
    for name, tensor in student.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return name
    return "the loss"
