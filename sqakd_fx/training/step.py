"""What one step computes: the gradient of a batch, in as many parts as fit into memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from sqakd_fx.diagnostics.batch_errors import call, is_out_of_memory
from sqakd_fx.engine.cuda_graph import RecordedStep
from sqakd_fx.engine.distributed import (
    is_distributed,
    share_of,
    weight_of_share,
    with_reduced_gradients,
)
from sqakd_fx.engine.memory_format import channels_last
from sqakd_fx.errors import TrainingError
from sqakd_fx.ir.op_table import op_of
from sqakd_fx.recipe.keys import Recipe
from sqakd_fx.training.features import TrainingPair
from sqakd_fx.training.losses import cross_entropy
from sqakd_fx.training.teacher_cache import TeacherCache


class GradientStep:
    """Computes the gradients of a batch's loss; `parts` grows where memory runs out.

    With a `cache` the teacher's outputs come from there. Called with a tuple of model inputs, the whole batch over all
    processes, it leaves the gradients in the student's parameters and returns the detached loss: this process's part
    of the mean. Where the recipe's loss has a share of `labels`, they stand behind the inputs.
    """

    def __init__(
        self,
        pair: TrainingPair,
        recipe: Recipe,
        device: torch.device,
        on_note: Callable[[str], None],
        cache: TeacherCache | None = None,
    ) -> None:
        self.student, self.teacher, self.loss = pair.student, pair.teacher, pair.loss
        self.cache = cache
        self.device, self.on_note = device, on_note
        self.half = recipe.precision == "bf16"
        self.labels = recipe.labels
        self.parts = recipe.accumulate
        self.is_steep = _has_infinite_derivatives(pair.student)
        self.running = with_reduced_gradients(pair.student)
        self.recorded: RecordedStep | None = None
        if recipe.cuda_graph and device.type == "cuda" and not is_distributed():
            parameters = list(pair.student.parameters())
            self.recorded = RecordedStep(self._whole, parameters, device, on_note)

    def __call__(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Raises TrainingError where not even one sample fits into memory."""
        mine = share_of(inputs)
        weight = weight_of_share(inputs, mine)
        while True:
            try:
                if self.recorded is not None and self.cache is None:
                    return self.recorded(mine)
                return self._whole(mine, weight)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if is_distributed() or self.parts >= len(mine[0]):
                    raise TrainingError(
                        "training runs out of memory even in small parts: lower batch_size"
                    ) from error
                self.parts *= 2
            self.on_note(f"out of memory: every batch is computed in {self.parts} parts from here")

    def forget_recording(self) -> None:
        """To be called where steps go another way than before, or tensors are no longer those they were."""
        if self.recorded is not None:
            self.recorded.forget()

    def _whole(self, batch: tuple[Tensor, ...], weight: float = 1.0) -> Tensor:
        self.student.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for part, share in _parts(batch, self.parts):
            total += self._of_part(part, weight * share)
        if self.is_steep:
            _drop_infinite_gradients(self.student)
        return total

    def _of_part(self, given: tuple[Tensor, ...], weight: float) -> Tensor:
        inputs = tuple(self._placed(x) for x in given)
        if self.labels:
            given, inputs, labels = given[:-1], inputs[:-1], inputs[-1]
        with torch.no_grad(), self._autocast():
            target = self.cache(given, inputs) if self.cache else call(self.teacher, *inputs)
        with self._autocast():
            output = call(self.running, *inputs)
        loss = self.loss(output, target)
        if self.labels:
            loss = (1 - self.labels) * loss + self.labels * cross_entropy(output, labels)
        loss = weight * loss
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _placed(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return channels_last(x.to(self.device, non_blocking=True))

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if not self.half:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


def _has_infinite_derivatives(student: nn.Module) -> bool:
    """Whether a root or a power reads values that may be exactly 0, as quantized ones are."""
    if not isinstance(student, fx.GraphModule):
        return False
    modules = dict(student.named_modules())
    ops = (op_of(node, modules) for node in student.graph.nodes)
    return any(op is not None and op.is_steep for op in ops)


def _drop_infinite_gradients(student: nn.Module) -> None:
    """Zero in the place of NaN and infinity: at 0 the derivative of a root is infinite, and times 0 it is NaN."""
    for parameter in student.parameters():
        if parameter.grad is not None:
            parameter.grad.nan_to_num_(0.0, 0.0, 0.0)


def _parts(inputs: tuple[Tensor, ...], count: int) -> Iterator[tuple[tuple[Tensor, ...], float]]:
    """A batch in parts along its first axis, with each part's share of the samples."""
    size = len(inputs[0])
    for index in range(min(count, size)):
        part = tuple(
            x.tensor_split(min(count, size))[index]
            if isinstance(x, Tensor) and x.ndim and len(x) == size
            else x
            for x in inputs
        )
        yield part, len(part[0]) / size
