"""Inputs made of a network's own BatchNorm statistics, for where there is no data.

A batch begins as noise. Adam changes it until the mean and the variance of what every BatchNorm layer reads are those
that it saw in training, as ZeroQ, DeepInversion and GENIE do. Images are smoothed and shifted on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import Dataset

from sqakd_fx.errors import SourceError, short
from sqakd_fx.frontend.copy_model import float_copy
from sqakd_fx.frontend.example_call import Example, arguments

_RATE = 0.1
_SHIFTS = 16
"""An image is shifted by at most its size divided by this."""
_INSTEAD = "give real inputs with --data or train_data()"


@dataclass(frozen=True)
class DataFree:
    """What to make in place of training data: how many samples, with how many steps of Adam for each batch."""

    samples: int = 512
    steps: int = 150

    @property
    def sentence(self) -> str:
        """What is to be made."""
        return f"{self.samples} inputs of BatchNorm's statistics"


class SyntheticSamples(Dataset[Tensor]):
    """Samples that were made of statistics.

    Attributes:
        samples: all of them, in one tensor.
        layers: BatchNorm layers whose statistics they have.
        distance: mean distance to these statistics, and that of the noise which they began as.
    """

    def __init__(self, samples: Tensor, layers: int, distance: tuple[float, float]) -> None:
        self.samples, self.layers, self.distance = samples, layers, distance

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Tensor:
        return self.samples[index]

    @property
    def sentence(self) -> str:
        """What they are, in a line."""
        reached, noise = self.distance
        return (
            f"{len(self)} inputs made of the statistics of {self.layers} BatchNorm layers "
            f"(distance {reached:.3g}, noise {noise:.3g})"
        )


def synthetic_samples(
    model: nn.Module,
    example_inputs: Example,
    wanted: DataFree = DataFree(),
    *,
    batch_size: int = 128,
    seed: int = 0,
    device: torch.device | str = "cpu",
    on_step: Callable[[int, int], None] | None = None,
) -> SyntheticSamples:
    """Make inputs of the statistics in a trained model's BatchNorm layers.

    Args:
        model: a trained float model; it is copied, not changed.
        example_inputs: one call of the model, whose one tensor of floats gives the shape.
        wanted: how many samples, and steps for each batch of them.
        on_step: is told of steps that are done, and of how many.

    Raises:
        SourceError: the model has no such statistics, or takes more than one tensor of floats.
    """
    call = _Call.of(example_inputs)
    net = float_copy(model).requires_grad_(False).to(device)
    layers = _layers_in(net, call, device)
    sizes = [min(batch_size, wanted.samples - at) for at in range(0, wanted.samples, batch_size)]
    generator = torch.Generator().manual_seed(seed)
    made, distances = [], []
    for index, size in enumerate(sizes):
        noise = torch.randn(size, *call.example.shape[1:], generator=generator).to(device)
        batch = _Batch(net, call, layers, wanted.steps, generator)
        for step in batch.improve(noise):
            if on_step is not None:
                on_step(index * wanted.steps + step, len(sizes) * wanted.steps)
        made.append(batch.samples)
        distances.append((batch.distance(batch.samples), batch.distance(noise)))
    reached, before = (sum(one) / len(distances) for one in zip(*distances, strict=True))
    return SyntheticSamples(torch.cat(made).cpu(), len(layers), (reached, before))


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of a model with one tensor of floats, which can be another one."""

    leaves: tuple[Any, ...]
    structure: Any
    place: int

    @classmethod
    def of(cls, example: Example) -> _Call:
        leaves, structure = tree_flatten(arguments(example))
        tensors = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        if len(tensors) != 1 or not leaves[tensors[0]].is_floating_point():
            kinds = ", ".join(f"{leaves[at].dtype}".removeprefix("torch.") for at in tensors)
            raise SourceError(
                f"--data-free makes one tensor of floats, and the model takes {len(tensors)} ({kinds}): {_INSTEAD}"
            )
        return cls(tuple(leaves), structure, tensors[0])

    @property
    def example(self) -> Tensor:
        found: Tensor = self.leaves[self.place]
        return found

    def run(self, net: nn.Module, x: Tensor) -> None:
        leaves = [x if at == self.place else leaf for at, leaf in enumerate(self.leaves)]
        args, kwargs = tree_unflatten(leaves, self.structure)
        net(*args, **kwargs)


class _Batch:
    """A batch on its way from noise to samples."""

    def __init__(
        self,
        net: nn.Module,
        call: _Call,
        layers: Sequence[nn.Module],
        steps: int,
        generator: torch.Generator,
    ) -> None:
        self.net, self.call, self.layers = net, call, layers
        self.steps, self.generator = steps, generator
        self.samples = torch.empty(0)

    def improve(self, noise: Tensor) -> Iterator[int]:
        """Each step's number, once it is done."""
        values = noise.clone().requires_grad_()
        optimizer = torch.optim.Adam([values], lr=_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        for step in range(1, self.steps + 1):
            loss = self._distance(_shifted(_smoothed(values), self.generator))
            optimizer.zero_grad()
            try:
                loss.backward()  # type: ignore[no-untyped-call]
            except RuntimeError as error:
                raise SourceError(
                    f"--data-free needs gradients through the model, which it has not ({short(error)}): {_INSTEAD}"
                ) from error
            optimizer.step()
            schedule.step()
            yield step
        self.samples = _smoothed(values).detach()
        if not bool(torch.isfinite(self.samples).all()):
            raise SourceError(
                f"--data-free gave inputs that are not finite, so the model's statistics cannot be met: {_INSTEAD}"
            )

    @torch.no_grad()
    def distance(self, x: Tensor) -> float:
        """How far the statistics of samples are from those of the layers."""
        return float(self._distance(x))

    def _distance(self, x: Tensor) -> Tensor:
        """Mean over the layers: squared differences of means and of deviations, in units of the deviation."""
        with _reads(self.layers) as seen:
            self.call.run(self.net, x)
        found = [_difference(layer, seen[layer]) for layer in self.layers]
        return torch.stack(found).mean()


def _difference(layer: nn.Module, read: Tensor) -> Tensor:
    axes = [axis for axis in range(read.ndim) if axis != 1]
    eps = float(getattr(layer, "eps", 1e-5))
    mean, variance = read.mean(axes), read.var(axes, unbiased=False) + eps
    wanted_mean, wanted = _statistics(layer)
    of_means = (mean - wanted_mean).square() / (wanted + eps)
    return (of_means + ((variance / (wanted + eps)).sqrt() - 1).square()).mean()


def _statistics(layer: nn.Module) -> tuple[Tensor, Tensor]:
    return layer.get_buffer("running_mean"), layer.get_buffer("running_var")


@contextmanager
def _reads(layers: Sequence[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """What each layer reads while the model runs."""
    seen: dict[nn.Module, Tensor] = {}

    def note(layer: nn.Module, given: tuple[Any, ...]) -> None:
        seen[layer] = given[0]

    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _layers_in(net: nn.Module, call: _Call, device: torch.device | str) -> list[nn.Module]:
    """The BatchNorm layers that run, in their order; also torchvision's frozen ones.

    Raises:
        SourceError: there are none, or they were never trained.
    """
    instance = torch.nn.modules.instancenorm._InstanceNorm
    held = [
        layer
        for layer in net.modules()
        if {"running_mean", "running_var"} <= dict(layer.named_buffers(recurse=False)).keys()
        and not isinstance(layer, instance)
    ]
    with torch.no_grad(), _reads(held) as seen:
        call.run(net, call.example.to(device))
    layers = [layer for layer in held if layer in seen]
    if not layers:
        raise SourceError(
            f"--data-free needs the running statistics of BatchNorm layers, and the model has none: {_INSTEAD}"
        )
    untouched = [
        bool((mean == 0).all() and (var == 1).all()) for mean, var in map(_statistics, layers)
    ]
    if all(untouched):
        raise SourceError(
            "--data-free needs the running statistics of a trained model, and those of this one's BatchNorm layers "
            "are the initial ones: load trained weights"
        )
    return layers


def _smoothed(x: Tensor) -> Tensor:
    """Images with a binomial filter of 3×3, which takes the finest noise out; other inputs as they are."""
    if x.ndim != 4 or min(x.shape[2:]) < 3:
        return x
    weights = torch.tensor([1.0, 2.0, 1.0], device=x.device) / 4
    filter_ = torch.outer(weights, weights).expand(x.shape[1], 1, 3, 3)
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), filter_, groups=x.shape[1])


def _shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Images, all rolled by one small distance, so that no pixel has a place of its own; other inputs as they are."""
    if x.ndim != 4:
        return x
    far = [size // _SHIFTS for size in x.shape[2:]]
    by = [int(torch.randint(-most, most + 1, (), generator=generator)) for most in far]
    return torch.roll(x, by, (2, 3))
