"""A step recorded as one CUDA graph: a GPU runs its kernels one after another, with no Python in between."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sqakd_fx.engine.memory_format import channels_last
from sqakd_fx.errors import short

_STEPS_BEFORE = 3
"""Steps of one form that run as they are: they compile, fill caches, and in the last choose kernels."""

Step = Callable[[tuple[Tensor, ...]], Tensor]
"""From a batch to its detached loss; leaves gradients in the parameters."""


@dataclass(frozen=True)
class _Recording:
    """A graph with the memory that it reads and writes."""

    form: tuple[Any, ...]
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    gradients: tuple[Tensor | None, ...]
    loss: Tensor


class RecordedStep:
    """`step` on a GPU; from its fourth batch of one form on it is replayed from a recording.

    A recording reads parameters and buffers where they lie, so what is changed in place it sees; `forget` it
    where Python code of the step would go another way. Batches of other shapes run as they are. Where a step
    cannot be recorded (it waits for a value of the GPU, say) all run as they are, with a note.
    """

    def __init__(
        self,
        step: Step,
        parameters: Sequence[nn.Parameter],
        device: torch.device,
        on_note: Callable[[str], None],
    ) -> None:
        self.step, self.parameters, self.device = step, parameters, device
        self.on_note = on_note
        self.works = True
        self.recording: _Recording | None = None
        self.form: tuple[Any, ...] = ()
        self.alike = 0

    def forget(self) -> None:
        """Drop the recording; the next steps make a new one."""
        self.recording, self.alike = None, 0

    def __call__(self, inputs: tuple[Tensor, ...]) -> Tensor:
        form = _form(inputs)
        if self.recording is not None and form == self.recording.form:
            return self._replayed(self.recording, inputs)
        self.alike = self.alike + 1 if form == self.form else 1
        self.form = form
        if self.recording is not None or not self.works or self.alike < _STEPS_BEFORE:
            return self.step(inputs)
        with _fastest_kernels():
            if self.alike > _STEPS_BEFORE:
                self.recording = self._recorded(inputs, form)
            if self.recording is not None:
                return self._replayed(self.recording, inputs)
            return self.step(inputs)

    def _recorded(self, inputs: tuple[Tensor, ...], form: tuple[Any, ...]) -> _Recording | None:
        held = tuple(
            channels_last(x.to(self.device, copy=True)) if isinstance(x, Tensor) else x
            for x in inputs
        )
        graph = torch.cuda.CUDAGraph()
        random = torch.cuda.default_generators[torch.cuda.current_device()]
        before = random.clone_state()
        try:
            # a loader's thread may pin memory meanwhile
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                loss = self.step(held)
        except RuntimeError as error:
            # torch leaves its generator as if it still recorded: it would refuse to draw from here on
            random.graphsafe_set_state(before)
            self.works = False
            self.on_note(f"steps are not recorded as a CUDA graph: {short(error)}")
            return None
        return _Recording(form, graph, held, tuple(p.grad for p in self.parameters), loss)

    def _replayed(self, recording: _Recording, inputs: tuple[Tensor, ...]) -> Tensor:
        for held, given in zip(recording.inputs, inputs, strict=True):
            if isinstance(held, Tensor):
                held.copy_(given, non_blocking=True)
        for parameter, gradient in zip(self.parameters, recording.gradients, strict=True):
            parameter.grad = gradient
        recording.graph.replay()
        return recording.loss


def _form(inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    return tuple((x.shape, x.dtype) if isinstance(x, Tensor) else x for x in inputs)


@contextlib.contextmanager
def _fastest_kernels() -> Iterator[None]:
    """Inside, cuDNN times its kernels for a new shape and takes the fastest, unless torch is deterministic."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark
    cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        cudnn.benchmark = before
