"""Self-supervised quantization-aware distillation: the training loop.

The student starts from the teacher, sees the same unlabelled batches, and minimises the distance of
its output from the teacher's. Losses stay on the device between reports, so a step costs no
synchronisation. A run can be interrupted at any moment and goes on from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn

from sqakd_fx.calibrate import quantizers_of
from sqakd_fx.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    pack_optimizer,
    save_checkpoint,
    unpack_optimizer,
)
from sqakd_fx.distributed import (
    any_process,
    is_distributed,
    is_first,
    mean_of,
    share_of,
    synchronised,
    weight_of_share,
    with_reduced_gradients,
)
from sqakd_fx.errors import SqakdError, StorageError, TrainingError
from sqakd_fx.losses import distillation_loss
from sqakd_fx.recipe import Recipe

_REPORT_STEPS = 20
_COMPILE_FROM_STEPS = 600
_ROLLBACKS = 3


@dataclass(frozen=True)
class StepReport:
    """What is known after some steps: the mean loss since the last report, and the pace."""

    step: int
    steps: int
    loss: float
    learning_rate: float
    steps_per_second: float


@dataclass(frozen=True)
class Distilled:
    """The end of a run: steps done, the last mean loss, seconds, whether it ran compiled, notes."""

    steps: int
    loss: float
    seconds: float
    compiled: bool
    notes: tuple[str, ...]


class Interrupted(SqakdError):
    """SIGINT or SIGTERM arrived; the state is saved."""


class _NotFinite(Exception):
    pass


Batches = Callable[[int], Iterable[tuple[Any, ...]]]
"""Epoch number to an iterable of input tuples; the same number gives the same batches."""


def distil(
    student: fx.GraphModule,
    teacher: nn.Module,
    batches: Batches,
    recipe: Recipe,
    *,
    steps_per_epoch: int,
    device: torch.device,
    checkpoints: Path | None = None,
    resume: bool = False,
    on_report: Callable[[StepReport], None] = lambda report: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> Distilled:
    """Train `student` (calibrated, on `device`) in place; it ends in evaluation mode.

    `checkpoints` is a folder for checkpoints, None for none. With `resume`, training goes on from
    the newest undamaged one.

    Raises:
        TrainingError: there is no data, or the loss is not finite even at lower learning rates.
        Interrupted: SIGINT or SIGTERM; the state is in `checkpoints`.
    """
    run = _Run(student, teacher, batches, recipe, steps_per_epoch, device, checkpoints, on_note)
    if resume and checkpoints is not None:
        run.restore_latest()
    return run.train(on_report)


class _Run:
    """The state of one training run."""

    def __init__(
        self,
        student: fx.GraphModule,
        teacher: nn.Module,
        batches: Batches,
        recipe: Recipe,
        steps_per_epoch: int,
        device: torch.device,
        checkpoints: Path | None,
        on_note: Callable[[str], None],
    ) -> None:
        self.student = student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.teacher = teacher.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self.batches = batches
        self.recipe, self.device, self.checkpoints = recipe, device, checkpoints
        self.steps_per_epoch = max(steps_per_epoch, 1)
        self.total = recipe.steps if recipe.steps is not None else recipe.epochs * steps_per_epoch
        self.optimizer = _optimizer(student, recipe, device)
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.average = _Average(student, recipe.weight_average) if recipe.weight_average else None
        self.loss = distillation_loss(recipe)
        self.running = with_reduced_gradients(self.student)
        self.step = 0
        self.parts = recipe.accumulate
        self.rate_factor = 1.0
        self.rollbacks = 0
        self.notes: list[str] = []
        self.on_note = on_note
        self.saved_at = time.monotonic()
        self.last_good: Checkpoint | None = None
        self.saving_paused = False

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.on_note(text)

    # -- the loop --------------------------------------------------------------------------

    def train(self, on_report: Callable[[StepReport], None]) -> Distilled:
        started = time.monotonic()
        compiled = self._compile()
        self.student.train()
        mean = float("nan")
        self.last_good = self._pack()
        with synchronised(self.student), _signals() as signalled:
            while self.step < self.total:
                try:
                    mean = self._until_end(on_report, signalled, mean)
                except _NotFinite:
                    self._roll_back()
        if self.average is not None:
            self.average.copy_to(self.student)
        self.student.eval()
        return Distilled(self.step, mean, time.monotonic() - started, compiled, tuple(self.notes))

    def _until_end(
        self, on_report: Callable[[StepReport], None], signalled: list[int], mean: float
    ) -> float:
        """Steps until the last one; raises _NotFinite where a loss is not."""
        total = torch.zeros((), device=self.device)
        reported, since, clock = self.step, self.step, time.monotonic()
        while self.step < self.total:
            epoch, skip = divmod(self.step, self.steps_per_epoch)
            drawn = 0
            for inputs in self._epoch(epoch, skip):
                drawn += 1
                total += self._one_step(inputs)
                self.step += 1
                due = (
                    self.step - reported >= _REPORT_STEPS
                    or self.step == self.total
                    or self._asks_for_checkpoint()
                )
                stop = (
                    any_process(bool(signalled), self.device)
                    if due
                    else (bool(signalled) and not is_distributed())
                )
                if due or stop:
                    value = float(mean_of(total)) / (self.step - since)
                    if not math.isfinite(value):
                        raise _NotFinite
                    mean, now = value, time.monotonic()
                    pace = (self.step - reported) / max(now - clock, 1e-9)
                    rate = self.optimizer.param_groups[0]["lr"]
                    on_report(StepReport(self.step, self.total, mean, float(rate), pace))
                    reported, since, clock = self.step, self.step, now
                    total = torch.zeros((), device=self.device)
                    self._save_if_due(force=stop)
                if stop:
                    raise Interrupted(
                        f"stopped at step {self.step} of {self.total}: the state is saved, "
                        "go on with --resume"
                        if self.checkpoints is not None and not self.saving_paused
                        else f"stopped at step {self.step} of {self.total}: nothing was saved"
                    )
                if self.step >= self.total or self.step % self.steps_per_epoch == 0:
                    break
            if not drawn:
                raise TrainingError("the training data gave no batch: check train_data() or --data")
            if self.step < self.total and self.step % self.steps_per_epoch:
                self.step += self.steps_per_epoch - self.step % self.steps_per_epoch
        return mean

    def _epoch(self, epoch: int, skip: int) -> Iterator[tuple[Any, ...]]:
        seed_everything(self.recipe.seed * 1_000_003 + epoch)
        for index, inputs in enumerate(self.batches(epoch)):
            if index >= skip:
                yield inputs

    def _one_step(self, inputs: tuple[Any, ...]) -> Tensor:
        self._set_rates()
        mine = share_of(inputs)
        weight = weight_of_share(inputs, mine)
        loss = self._backward(mine, weight)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.student)
        return loss

    def _backward(self, inputs: tuple[Any, ...], weight: float) -> Tensor:
        """Gradients of the whole batch, in as many parts as fit into memory."""
        while True:
            self.optimizer.zero_grad(set_to_none=True)
            try:
                total = torch.zeros((), device=self.device)
                for part, share in _parts(inputs, self.parts):
                    total += self._backward_of_part(part, weight * share)
                return total
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                if is_distributed() or self.parts >= len(inputs[0]):
                    raise TrainingError(
                        "training runs out of memory even in small parts: lower batch_size"
                    ) from error
                self.parts *= 2
                self.note(f"out of memory: every batch is computed in {self.parts} parts from here")

    def _backward_of_part(self, inputs: tuple[Any, ...], weight: float) -> Tensor:
        inputs = tuple(self._placed(x) for x in inputs)
        with torch.no_grad(), self._autocast():
            target = self.teacher(*inputs)
        with self._autocast():
            output = self.running(*inputs)
        loss = weight * self.loss(output, target)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _placed(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x.to(self.device, non_blocking=True)
        return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.recipe.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def _set_rates(self) -> None:
        factor = self.rate_factor * schedule(self.recipe, self.step, self.total)
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * factor

    def _compile(self) -> bool:
        wanted = self.recipe.compile == "always" or (
            self.recipe.compile == "auto" and self.total - self.step >= _COMPILE_FROM_STEPS
        )
        if not wanted:
            return False
        if not has_compiler(self.device):
            self.note("no C++ compiler was found: training runs uncompiled, about half as fast")
            return False
        self.note("compiling the student and the teacher for the first step (about a minute)")
        self.student.compile()
        self.teacher.compile()
        return True

    # -- checkpoints -----------------------------------------------------------------------

    def _pack(self) -> Checkpoint:
        tensors = {f"student.{k}": v.detach().clone() for k, v in self.student.state_dict().items()}
        packed, state = pack_optimizer(self.optimizer)
        tensors |= {f"optimizer.{k}": v.clone() for k, v in packed.items()}
        if self.average is not None:
            tensors |= {f"average.{k}": v.clone() for k, v in self.average.values.items()}
        return Checkpoint(
            self.step,
            tensors,
            {"optimizer": state, "rate_factor": self.rate_factor, "rollbacks": self.rollbacks},
        )

    def _unpack(self, checkpoint: Checkpoint) -> None:
        def part(prefix: str) -> dict[str, Tensor]:
            return {
                k.removeprefix(prefix): v
                for k, v in checkpoint.tensors.items()
                if k.startswith(prefix)
            }

        try:
            self.student.load_state_dict(part("student."))
        except RuntimeError as error:
            raise TrainingError(
                "the checkpoint does not fit this model and recipe: start again without --resume"
            ) from error
        unpack_optimizer(self.optimizer, part("optimizer."), checkpoint.state["optimizer"])
        if self.average is not None:
            self.average.values = {k: v.to(self.device) for k, v in part("average.").items()}
        for quantizer in quantizers_of(self.student).values():
            quantizer.enabled = True
        self.step = checkpoint.step
        self.rate_factor = float(checkpoint.state["rate_factor"])

    def restore_latest(self) -> None:
        assert self.checkpoints is not None
        checkpoint, notes = latest_checkpoint(self.checkpoints)
        for text in notes:
            self.note(text)
        if checkpoint is None:
            self.note("there is no checkpoint to resume from: training starts at step 0")
            return
        self._unpack(checkpoint)
        self.rollbacks = int(checkpoint.state["rollbacks"])
        self.note(f"resumed at step {self.step} of {self.total}")

    def _asks_for_checkpoint(self) -> bool:
        every = self.recipe.checkpoint_steps
        return every is not None and self.step % every == 0

    def _save_if_due(self, *, force: bool) -> None:
        due = time.monotonic() - self.saved_at >= self.recipe.checkpoint_seconds
        if not any_process(due or force or self._asks_for_checkpoint(), self.device):
            return
        self.last_good = self._pack()
        self.saved_at = time.monotonic()
        if self.checkpoints is None or not is_first():
            return
        try:
            save_checkpoint(self.checkpoints, self.last_good)
            self.saving_paused = False
        except StorageError as error:
            if not self.saving_paused:
                self.note(f"checkpoints pause: {error}")
            self.saving_paused = True

    def _roll_back(self) -> None:
        self.rollbacks += 1
        where = first_not_finite(self.student)
        if self.rollbacks > _ROLLBACKS or self.last_good is None:
            raise TrainingError(
                f"the loss is not finite, also at {self.rate_factor:g} times the learning rate; "
                f"it starts in {where}: lower learning_rate or raise its bits",
                node=where,
            )
        self._unpack(self.last_good)
        self.rate_factor *= 0.5
        self.note(
            f"the loss was not finite (first in {where}): back to step {self.step}, "
            f"learning rate times {self.rate_factor:g}"
        )


class _Average:
    """Exponential moving average of the student's parameters."""

    def __init__(self, student: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {k: p.detach().clone() for k, p in student.named_parameters()}

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        pairs = [(self.values[k], p.detach()) for k, p in student.named_parameters()]
        torch._foreach_lerp_([a for a, _ in pairs], [p for _, p in pairs], 1 - self.decay)

    @torch.no_grad()
    def copy_to(self, student: nn.Module) -> None:
        for name, parameter in student.named_parameters():
            parameter.copy_(self.values[name])


def _parts(inputs: tuple[Any, ...], count: int) -> Iterator[tuple[tuple[Any, ...], float]]:
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


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        text in str(error)
        for text in ("can't allocate memory", "not enough memory", "out of memory")
    )


def schedule(recipe: Recipe, step: int, total: int) -> float:
    """Learning-rate factor of a step: linear warm-up, then cosine to 0 or constant."""
    warm = int(recipe.warmup * total)
    if step < warm:
        return (step + 1) / warm
    if recipe.schedule == "constant":
        return 1.0
    done = (step - warm) / max(total - warm, 1)
    return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch; loaders and augmentations draw from all three."""
    import random

    import numpy as np

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def has_compiler(device: torch.device) -> bool:
    """True where torch.compile can build code: a C++ compiler on CPU, Triton on CUDA."""
    if device.type == "cuda":
        return torch.utils._triton.has_triton()
    return any(shutil.which(name) for name in ("g++", "clang++", "c++"))


def first_not_finite(student: fx.GraphModule) -> str:
    """The first parameter or buffer that is not finite, in graph order; "the loss" if none is."""
    for name, tensor in student.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return name
    return "the loss"


def _optimizer(student: nn.Module, recipe: Recipe, device: torch.device) -> torch.optim.Optimizer:
    """Weights with decay, everything else without, quantizer parameters at their own rate."""
    of_quantizers = {
        id(p) for q in quantizers_of(student).values() for p in q.parameters(recurse=False)
    }
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    ranges: list[nn.Parameter] = []
    for parameter in student.parameters():
        if id(parameter) in of_quantizers:
            ranges.append(parameter)
        elif parameter.ndim > 1:
            decayed.append(parameter)
        else:
            plain.append(parameter)
    groups = [
        {"params": decayed, "lr": recipe.learning_rate, "weight_decay": recipe.weight_decay},
        {"params": plain, "lr": recipe.learning_rate, "weight_decay": 0.0},
        {"params": ranges, "lr": recipe.quantizer_learning_rate, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise TrainingError("the student has no parameters to train: use --steps 0")
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=recipe.momentum, fused=True)
    kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, fused=True)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying, so that the step can finish."""
    received: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    try:
        previous = {s: signal.signal(s, remember) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
