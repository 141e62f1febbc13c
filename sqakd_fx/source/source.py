"""What the user's model.py gives: a model, example inputs, unlabelled data, and a metric."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.data import Dataset

from sqakd_fx.diagnostics.source_lines import user_line
from sqakd_fx.engine.torch_settings import plain_settings
from sqakd_fx.errors import SourceError, short
from sqakd_fx.frontend.example_call import call_of, named_parameters
from sqakd_fx.frontend.readable import require_readable
from sqakd_fx.source.arrays import read_data, what_happens
from sqakd_fx.source.batches import Batch, Loading, input_batches
from sqakd_fx.source.images import ImageFolder
from sqakd_fx.source.items import TARGET_KEYS, Form, form_of
from sqakd_fx.source.model_file import find_user_code
from sqakd_fx.source.synthetic import DataFree
from sqakd_fx.source.torchvision_models import torchvision_default, torchvision_shape
from sqakd_fx.source.transform import Transform
from sqakd_fx.source.user_functions import UserFunctions, plain_tensor
from sqakd_fx.source.weights import load_weights

_MOST_VALUES = 2**28
"""Of an example that is made up: 1 GiB in float32."""


@dataclass(frozen=True, eq=False)
class Source:
    """A trained float model in evaluation mode on the CPU, and its data.

    `name` suits a folder. `metric` takes all outputs and all targets, concatenated. `notes` say what was chosen.
    """

    spec: str
    name: str
    model: nn.Module
    example_inputs: tuple[Any, ...]
    example_kwargs: dict[str, Any]
    train_data: Iterable[Any] | Dataset[Any] | DataFree | None
    eval_data: Iterable[Any] | Dataset[Any] | None
    metric: Callable[[Any, Any], float] | None
    notes: tuple[str, ...] = ()

    @property
    def form(self) -> Form:
        """What the model takes of an item of the data."""
        return form_of(call_of(self.model, self.example_inputs, self.example_kwargs))

    @property
    def labels_ignored(self) -> bool:
        """Whether the training data comes with labels; draws its first batch."""
        if self.train_data is None or isinstance(self.train_data, DataFree):
            return False
        batches = input_batches(self.train_data, self.form, Loading(batch_size=1))
        next(iter(batches))
        return batches.labels_ignored


@plain_settings()
def load_source(
    spec: str,
    *,
    weights: Path | None = None,
    data: Path | DataFree | None = None,
    input_shape: tuple[int, ...] | None = None,
    transform: Transform | None = None,
    tokenizer: str | None = None,
) -> Source:
    """Load a model and its data from "path/to/model.py" or "package.module:callable".

    Args:
        weights: a state dict: safetensors, or a pickle of tensors only; "FILE:KEY" where a file holds several.
        data: a folder of images or sounds, .npy, .npz, .txt, .csv or .parquet, in place of `train_data()`; or what is
            to be made of the model's own statistics.
        input_shape: shape of the one input, batch axis first, in place of `example_inputs()`.
        transform: what the images of `data` go through.
        tokenizer: what makes inputs of the sentences of `data`: a folder, or a name of the Hugging Face hub.

    Raises:
        SourceError: anything is missing, fails or does not fit; where the fault is in the user's
            code, `location` is its file and line.
        TraceError: the model is not Python code with dense weights.
    """
    _check_shape(input_shape)
    path = data if isinstance(data, Path) else None
    require_data(path, transform, tokenizer)
    module, factory, name, folder = find_user_code(spec)
    user = UserFunctions(module, folder)
    input_shape = input_shape or torchvision_shape(factory)
    model, notes, own_transform = _trained_model(user, factory, spec, weights)
    if _has_images(path):
        transform = transform or own_transform
    require_readable(model)
    model = model.cpu().float().eval()

    example = _example(user, input_shape, tokenizer)
    train_data: Any
    if path is None:
        train_data = user.data("train_data") if data is None else data
    else:
        shape = _first_shape(example) or input_shape
        takes = named_parameters(inspect.signature(model.forward))
        train_data = read_data(path, shape, transform, tokenizer=tokenizer, takes=takes)
        notes += _about_samples(train_data, transform)
    if example is None:
        example = _example_from_data(model, train_data, spec)
    _check_runs(model, example, folder, input_shape)
    _check_finite_state(model)
    return Source(
        spec=spec,
        name=name,
        model=model,
        example_inputs=example.args,
        example_kwargs=example.kwargs,
        train_data=train_data,
        eval_data=user.data("eval_data"),
        metric=user.metric(),
        notes=tuple(notes),
    )


def _trained_model(
    user: UserFunctions, factory: Any, spec: str, weights: Path | None
) -> tuple[nn.Module, list[str], Transform | None]:
    """The model with its weights, what is said of them, and the transform of images that comes with them."""
    pretrained = None if weights is not None else torchvision_default(factory)
    if pretrained is not None:
        return pretrained.model, [pretrained.note], pretrained.transform
    model = user.model(factory, spec)
    if weights is not None:
        return model, [*load_weights(model, weights)], None
    return model, _about_weights(spec, factory), None


def _check_shape(input_shape: tuple[int, ...] | None) -> None:
    if input_shape is None:
        return
    if not input_shape or min(input_shape) < 1:
        raise SourceError(
            f"--input-shape {input_shape} is not a shape: give positive sizes with the batch "
            "axis first, such as 1,3,224,224"
        )
    if math.prod(input_shape) > _MOST_VALUES:
        raise SourceError(
            f"--input-shape {','.join(map(str, input_shape))} is a call of more than {_MOST_VALUES} values: give the "
            "sizes of one or two samples"
        )


def _has_images(data: Path | None) -> bool:
    return data is not None and data.is_dir()


def _about_weights(spec: str, factory: Any) -> list[str]:
    """A warning where a package's function makes the model, and nothing says with which weights."""
    if ":" not in spec or isinstance(factory, nn.Module):
        return []
    return [
        f"WARNING: the weights are those that {spec} makes, which may be random: give trained ones with --weights"
    ]


def _about_samples(samples: Any, transform: Transform | None) -> list[str]:
    """What happens to each sample of --data, and what does not."""
    if not isinstance(samples, ImageFolder):
        said = what_happens(samples)
        return [] if said is None else [said]
    lines = [samples.transform.sentence(samples.height, samples.width)]
    if transform is None:
        lines.append(
            "WARNING: no mean and std are taken off the images. If the model was trained with some, give --mean and "
            "--std, or a --transform such as imagenet; --transform none says that there are none"
        )
    return lines


def require_data(data: Path | None, transform: Transform | None, tokenizer: str | None) -> None:
    """Raise SourceError where something is said of files and no file is named."""
    if data is None and transform is not None:
        raise SourceError(
            "--transform, --mean, --std, --resize and --crop are for images of --data: name a folder of them"
        )
    if data is None and tokenizer is not None:
        raise SourceError("--tokenizer is for sentences of --data: name a file of them")


def _example(
    user: UserFunctions, input_shape: tuple[int, ...] | None, tokenizer: str | None
) -> Batch | None:
    """One call, drawn or of the user's; inputs of a tokenizer are whole numbers, which are not drawn."""
    if input_shape is None or tokenizer is not None:
        return user.example()
    return _random_example(input_shape)


def _first_shape(example: Batch | None) -> tuple[int, ...] | None:
    return None if example is None else tuple(_first_tensor(example.args, example.kwargs).shape)


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return next(x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))


def _random_example(shape: tuple[int, ...]) -> Batch:
    return Batch((torch.randn(shape, generator=torch.Generator().manual_seed(0)),), {})


def _example_from_data(model: nn.Module, data: Any, spec: str) -> Batch:
    if data is None or isinstance(data, DataFree):
        raise SourceError(
            f"the input shape of {spec} is not known: give --input-shape such as 1,3,224,224, "
            "or add example_inputs() to model.py"
        )
    signature = inspect.signature(model.forward)
    names = named_parameters(signature)
    required = sum(signature.parameters[name].default is inspect.Parameter.empty for name in names)
    inputs = tuple(name for name in names if name not in TARGET_KEYS)
    batches = input_batches(data, Form(max(required, 1), inputs), Loading(batch_size=2))
    first = next(iter(batches))
    args, kwargs = tree_map_only(
        Tensor, lambda x: plain_tensor(x[:2] if x.ndim else x), (first.args, first.kwargs)
    )
    return Batch(args, kwargs)


def _check_runs(
    model: nn.Module, example: Batch, folder: Path, input_shape: tuple[int, ...] | None
) -> None:
    try:
        with torch.no_grad():
            model(*example.args, **example.kwargs)
    except Exception as error:
        at = user_line(error, folder)
        tensors = [x for x in tree_leaves((example.args, example.kwargs)) if isinstance(x, Tensor)]
        shapes = " and ".join(str(tuple(x.shape)) for x in tensors)
        place = f" at {at}" if at else ""
        hint = (
            "give another --input-shape, or example_inputs() in model.py for inputs that are not "
            "one float tensor"
            if input_shape
            else "correct example_inputs() in model.py or give --input-shape"
        )
        raise SourceError(
            f"the model does not run on example inputs of shape {shapes}, {short(error)}{place}: "
            f"{hint}",
            location=at,
        ) from error


@torch.no_grad()  # weights may be made in inference mode
def _check_finite_state(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        _refuse_non_finite("parameter", name, torch.isfinite(parameter))
    for name, buffer in model.named_buffers():
        # A mask of an attention layer holds -inf on purpose.
        _refuse_non_finite("buffer", name, torch.isfinite(buffer) | torch.isneginf(buffer))


def _refuse_non_finite(kind: str, name: str, good: Tensor) -> None:
    if not bool(good.all()):
        raise SourceError(
            f"the {kind} {name!r} of the model has {int((~good).sum())} NaN or infinite values: "
            "load weights from a training run that did not diverge"
        )
