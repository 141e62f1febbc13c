"""What the user's model.py gives: a model, example inputs, unlabelled data, and a metric."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import os
import pickle
import sys
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.data import Dataset

from sqakd_fx.batches import TARGET_KEYS, Batch, input_batches, replayable, short, user_line
from sqakd_fx.errors import SourceError
from sqakd_fx.images import ImageFolder

_ARRAY_NAMES = ("images", "x", "data")
_STATE_KEYS = ("state_dict", "model_state_dict", "model")

# For the folder of each model.py loaded so far: the modules that were there before it.
_folders: dict[Path, frozenset[str]] = {}


@dataclass(frozen=True, eq=False)
class Source:
    """A trained float model in evaluation mode on the CPU, and its data.

    `name` suits a folder. `metric` takes all outputs and all targets, concatenated.
    """

    spec: str
    name: str
    model: nn.Module
    example_inputs: tuple[Any, ...]
    example_kwargs: dict[str, Any]
    train_data: Iterable[Any] | Dataset[Any] | None
    eval_data: Iterable[Any] | Dataset[Any] | None
    metric: Callable[[Any, Any], float] | None

    @property
    def n_inputs(self) -> int:
        """How many inputs the example gives to the model."""
        return len(self.example_inputs) + len(self.example_kwargs)

    @property
    def input_names(self) -> tuple[str, ...]:
        """The names of the example's inputs, in order: forward's own, then keyword arguments."""
        positional = _forward_names(self.model)[0][: len(self.example_inputs)]
        return (*positional, *self.example_kwargs)

    @property
    def example_ndim(self) -> int:
        """Axes of the example's first tensor."""
        return _first_tensor(self.example_inputs, self.example_kwargs).ndim

    @property
    def labels_ignored(self) -> bool:
        """Whether the training data comes with labels; draws its first batch."""
        if self.train_data is None:
            return False
        batches = input_batches(
            self.train_data,
            n_inputs=self.n_inputs,
            input_names=self.input_names,
            batch_size=1,
            shuffle=False,
            seed=0,
            example_ndim=self.example_ndim,
        )
        next(iter(batches))
        return batches.labels_ignored


class ArraySamples(Dataset[Tensor]):
    """Samples of an array of shape (N, ...).

    uint8 becomes float32 in [0, 1], floats become float32, other integers stay.
    """

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int) -> Tensor:
        sample = np.array(self.array[index])
        if sample.dtype == np.uint8:
            return torch.from_numpy(sample).float() / 255
        tensor = torch.from_numpy(sample)
        return tensor.float() if tensor.is_floating_point() else tensor


def load_source(
    spec: str,
    *,
    weights: Path | None = None,
    data: Path | None = None,
    input_shape: tuple[int, ...] | None = None,
) -> Source:
    """Load a model and its data from "path/to/model.py" or "package.module:callable".

    Args:
        weights: a state dict to load into the model: safetensors, or a pickle of tensors only.
        data: a folder of images, an .npy or an .npz file, in place of `train_data()`.
        input_shape: shape of the one input, batch axis first, in place of `example_inputs()`.

    Raises:
        SourceError: anything is missing, fails or does not fit; where the fault is in the user's
            code, `location` is its file and line.
    """
    if input_shape is not None and (not input_shape or min(input_shape) < 1):
        raise SourceError(
            f"--input-shape {input_shape} is not a shape: give positive sizes with the batch "
            "axis first, such as 1,3,224,224"
        )
    module, factory, name, folder = _find(spec)
    user = _UserCode(module, folder)
    model = user.model(factory, spec)
    if weights is not None:
        _load_weights(model, weights)
    model = model.cpu().float().eval()

    example = _random_example(input_shape) if input_shape else user.example()
    shape = tuple(_first_tensor(example.args, example.kwargs).shape) if example else None
    train_data = _read_data(data, shape) if data is not None else user.data("train_data")
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
    )


def _find(spec: str) -> tuple[ModuleType, Any, str, Path]:
    """The module, what makes the model, a name, and the folder of the user's code."""
    path = Path(spec).expanduser()
    module_name, colon, attribute = spec.partition(":")
    if path.suffix == ".py" or path.exists() or not colon:
        path = _python_file(path)
        module = _run_file(path)
        if not hasattr(module, "model"):
            functions = _functions_of(module)
            found = f"it defines {', '.join(functions)}" if functions else "it defines no function"
            raise SourceError(
                f"{path} has no function model() ({found}): "
                "add `def model():` that returns the trained nn.Module"
            )
        name = path.parent.name or "model" if path.name == "model.py" else path.stem
        return module, module.model, name, path.parent
    module = _import_module(spec, module_name)
    value = _attribute(spec, module, attribute)
    file = getattr(module, "__file__", None)
    folder = Path(file).parent if file else Path.cwd()
    return module, value, attribute.rpartition(".")[2], folder


def _python_file(path: Path) -> Path:
    if path.is_dir():
        inside = path / "model.py"
        hint = f"give {inside}" if inside.is_file() else "give the path of a model.py"
        raise SourceError(f"{path} is a folder, not a Python file: {hint}")
    if not path.exists():
        raise SourceError(
            f"{path} is not there: {_near_names(path) or 'check the path'}, "
            "or give package.module:callable"
        )
    if path.suffix != ".py":
        raise SourceError(
            f"{path} is not a Python file: give a model.py with a function model(), "
            "and a file of weights with --weights"
        )
    return path.resolve()


def _near_names(path: Path) -> str:
    """ "did you mean …" from the deepest folder of `path` that exists, or ""."""
    while path.parent != path and not path.parent.is_dir():
        path = path.parent
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(str(path.parent / name) for name in near)}" if near else ""


def _run_file(path: Path) -> ModuleType:
    folder = path.parent
    _make_importable(folder)
    name = f"_sqakd_source_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        _raise_import_error(error, str(path), folder)
    return module


def _make_importable(folder: Path) -> None:
    """Put `folder` first on sys.path and forget what other sources imported from their folders."""
    origins = {name: _origin(module) for name, module in list(sys.modules.items())}
    for other, before in _folders.items():
        if other == folder:
            continue
        inside = f"{other}{os.sep}"
        for name, origin in origins.items():
            if origin.startswith(inside) and name not in before and _is_at(name, origin, other):
                sys.modules.pop(name, None)
    _folders.setdefault(folder, frozenset(sys.modules))
    entry = str(folder)
    if entry in sys.path:
        sys.path.remove(entry)
    sys.path.insert(0, entry)
    importlib.invalidate_caches()


def _origin(module: Any) -> str:
    attributes = getattr(module, "__dict__", {})
    return str(attributes.get("__file__") or next(iter(attributes.get("__path__") or ()), ""))


def _is_at(name: str, origin: str, folder: Path) -> bool:
    """True where `name` was found with `folder` as its entry of sys.path."""
    expected = folder.joinpath(*name.split("."))
    return Path(origin) in (expected.with_suffix(".py"), expected / "__init__.py", expected)


def _import_module(spec: str, name: str) -> ModuleType:
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise SourceError(
                f"the module {error.name!r} of {spec!r} is not found: "
                "install it, or start in the folder that holds it"
            ) from error
        _raise_import_error(error, name, None)
    except (Exception, SystemExit) as error:
        _raise_import_error(error, name, None)


def _attribute(spec: str, module: ModuleType, dotted: str) -> Any:
    value: Any = module
    for part in dotted.split("."):
        if not hasattr(value, part):
            near = difflib.get_close_matches(part, dir(value), n=3)
            hint = f"did you mean {' or '.join(near)}" if near else "check the name after the colon"
            raise SourceError(
                f"{module.__name__} has no {dotted!r}, which {spec!r} asks for: {hint}"
            )
        value = getattr(value, part)
    return value


def _raise_import_error(error: BaseException, where: str, folder: Path | None) -> NoReturn:
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        location = f"{error.filename}:{error.lineno}"
        raise SourceError(
            f"{location} is not valid Python ({error.msg}): correct that line", location=location
        ) from error
    at = user_line(error, folder)
    place = f" at {at}" if at else ""
    if isinstance(error, ModuleNotFoundError):
        raise SourceError(
            f"{where} imports {error.name!r}{place}, which is not found: install it, "
            "or put its file beside the one that imports it",
            location=at,
        ) from error
    raise SourceError(
        f"{where} cannot be imported, {short(error)}{place}: correct what runs at import",
        location=at,
    ) from error


def _functions_of(module: ModuleType) -> list[str]:
    return [
        f"{name}()"
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__
    ]


@dataclass(frozen=True)
class _UserCode:
    """Calls of the functions in the user's module, with their errors made readable."""

    module: ModuleType
    folder: Path

    def model(self, factory: Any, spec: str) -> nn.Module:
        if isinstance(factory, nn.Module):
            return factory
        name = getattr(factory, "__name__", spec)
        if not callable(factory):
            raise SourceError(
                f"{name} in {spec} is a {type(factory).__name__}, not a function: "
                "make it a function that returns the trained nn.Module"
            )
        made = self._call(name, factory)
        if isinstance(made, nn.Module):
            return made
        at = _definition(factory)
        given = f"the class {made.__name__}" if isinstance(made, type) else _a(type(made).__name__)
        raise SourceError(
            f"{name}() in {at or spec} returned {given}, not an nn.Module: return the trained "
            "model itself",
            location=at,
        )

    def example(self) -> Batch | None:
        function = self._get("example_inputs")
        if function is None:
            return None
        value = self._value("example_inputs", function)
        if isinstance(value, dict):
            args: tuple[Any, ...] = ()
            kwargs = {str(k): v for k, v in value.items()}
        else:
            args, kwargs = (tuple(value) if isinstance(value, tuple | list) else (value,)), {}
        args, kwargs = tree_map_only(np.ndarray, torch.from_numpy, (args, kwargs))
        args, kwargs = tree_map_only(Tensor, _plain, (args, kwargs))
        if not any(isinstance(x, Tensor) for x in tree_leaves((args, kwargs))):
            at = _definition(function)
            raise SourceError(
                f"example_inputs() in {at or self.module.__name__} returned "
                f"{_a(type(value).__name__)} without a tensor: "
                "return a tensor, a tuple of tensors, or a dict of them",
                location=at,
            )
        return Batch(args, kwargs)

    def data(self, name: str) -> Iterable[Any] | None:
        function = self._get(name)
        if function is None:
            return None
        value = self._value(name, function)
        if not (hasattr(value, "__iter__") or hasattr(value, "__getitem__")):
            at = _definition(function)
            given = "nothing" if value is None else _a(type(value).__name__)
            raise SourceError(
                f"{name}() in {at or self.module.__name__} returned {given}: "
                "return a DataLoader, a Dataset, a tensor, or an iterable of batches",
                location=at,
            )
        data: Iterable[Any] = replayable(value)
        return data

    def metric(self) -> Callable[[Any, Any], float] | None:
        function = self._get("metric")
        if function is not None and not callable(function):
            raise SourceError(
                f"metric in {self.module.__file__} is a {type(function).__name__}: "
                "make it a function metric(outputs, targets) that returns a number"
            )
        return function  # type: ignore[no-any-return]

    def _get(self, name: str) -> Any:
        value = getattr(self.module, name, None)
        return None if isinstance(value, ModuleType) else value

    def _value(self, name: str, function: Any) -> Any:
        return self._call(name, function) if callable(function) else function

    def _call(self, name: str, function: Callable[[], Any]) -> Any:
        try:
            return function()
        except (Exception, SystemExit) as error:
            inside = user_line(error, self.folder)
            at = inside or _definition(function)
            place = f" at {at}" if at else ""
            advice = "correct that line" if inside else "make it callable without arguments"
            raise SourceError(
                f"{name}() failed with {short(error)}{place}: {advice}", location=at
            ) from error


def _definition(function: Any) -> str | None:
    code = getattr(function, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else None


def _a(noun: str) -> str:
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def _plain(x: Tensor) -> Tensor:
    x = x.detach().cpu()
    return x.float() if x.is_floating_point() else x


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return next(x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))


def _random_example(shape: tuple[int, ...]) -> Batch:
    return Batch((torch.randn(shape, generator=torch.Generator().manual_seed(0)),), {})


def _example_from_data(model: nn.Module, data: Any, spec: str) -> Batch:
    if data is None:
        raise SourceError(
            f"the input shape of {spec} is not known: give --input-shape such as 1,3,224,224, "
            "or add example_inputs() to model.py"
        )
    names, required = _forward_names(model)
    batches = input_batches(
        data,
        n_inputs=max(required, 1),
        input_names=tuple(name for name in names if name not in TARGET_KEYS),
        batch_size=2,
        shuffle=False,
        seed=0,
    )
    first = next(iter(batches))
    args, kwargs = tree_map_only(
        Tensor, lambda x: _plain(x[:2] if x.ndim else x), (first.args, first.kwargs)
    )
    return Batch(args, kwargs)


def _forward_names(model: nn.Module) -> tuple[tuple[str, ...], int]:
    """Names of forward's parameters, and how many of them have no default."""
    plain = [
        p
        for p in inspect.signature(model.forward).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    return tuple(p.name for p in plain), sum(p.default is p.empty for p in plain)


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


def _load_weights(model: nn.Module, path: Path) -> None:
    state = _unwrapped(_read_weights(path), path)
    expected = model.state_dict()
    present = {expected[name].data_ptr() for name in state if name in expected}
    missing = [
        name
        for name in expected
        if name not in state
        and not name.endswith("num_batches_tracked")
        and expected[name].data_ptr() not in present
    ]
    unexpected = [name for name in state if name not in expected]
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    faults = [
        f"{title} {_some(names)}"
        for title, names in (("missing", missing), ("unexpected", unexpected), ("shape of", shapes))
        if names
    ]
    if faults:
        raise SourceError(
            f"the weights in {path} do not fit the model, {'; '.join(faults)}: "
            "give the weights of this architecture"
        )
    model.load_state_dict(state, strict=False)


def _read_weights(path: Path) -> Any:
    _require_exists(path, "--weights")
    if path.is_dir():
        raise SourceError(f"--weights {path} is a folder: give a file of weights inside it")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported operand" in str(error):
            raise _unreadable(path, "it is not what torch.save writes") from error
        raise SourceError(
            f"the weights in {path} are refused, because the pickle holds more than tensors and "
            "could run code: save model.state_dict() alone, best as .safetensors"
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, SafetensorError) as error:
        raise _unreadable(path, short(error)) from error


def _unreadable(path: Path, reason: str) -> SourceError:
    return SourceError(
        f"the weights in {path} cannot be read ({reason}): give a whole file, "
        "named .safetensors if it is one"
    )


def _unwrapped(loaded: Any, path: Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint, without the prefix that DataParallel adds."""
    for key in _STATE_KEYS:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not loaded:
        raise SourceError(
            f"the weights in {path} are {_a(type(loaded).__name__)}, not a state dict "
            "with tensors: save model.state_dict()"
        )
    others = [str(name) for name, value in loaded.items() if not isinstance(value, Tensor)]
    if others:
        raise SourceError(
            f"the weights in {path} hold {_some(others)}, which are not tensors: "
            "save model.state_dict() alone"
        )
    if all(name.startswith("module.") for name in loaded):
        return {name.removeprefix("module."): tensor for name, tensor in loaded.items()}
    return loaded


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + rest


def _require_exists(path: Path, option: str) -> None:
    if not path.exists():
        raise SourceError(f"{option} {path} is not there: {_near_names(path) or 'check the path'}")


def _read_data(path: Path, shape: tuple[int, ...] | None) -> Dataset[Tensor]:
    _require_exists(path, "--data")
    if path.is_dir():
        return _read_images(path, shape)
    if path.suffix in (".npy", ".npz"):
        return _read_array(path, shape)
    raise SourceError(
        f"--data {path} is neither a folder of images nor .npy or .npz: give one of these"
    )


def _read_images(folder: Path, shape: tuple[int, ...] | None) -> Dataset[Tensor]:
    if shape is None:
        raise SourceError(
            f"the images in {folder} need a size: give --input-shape such as 1,3,224,224, "
            "or add example_inputs() to model.py"
        )
    if len(shape) != 4:
        raise SourceError(
            f"images in {folder} cannot become inputs of shape {shape}, which is not "
            "(N, channels, height, width): give --data as .npy, or train_data() in model.py"
        )
    return ImageFolder(folder, channels=shape[1], height=shape[2], width=shape[3])


def _read_array(path: Path, shape: tuple[int, ...] | None) -> ArraySamples:
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                name = next((n for n in _ARRAY_NAMES if n in arrays), next(iter(arrays), None))
                if name is None:
                    raise SourceError(f"{path} is empty, it has no array: save one named images")
                array = arrays[name]
        else:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        foreign = isinstance(error, ValueError) and "pickle" in str(error)
        reason = "it is not one of numbers" if foreign else short(error)
        raise SourceError(
            f"the array in {path} cannot be read ({reason}): "
            "save a plain numeric array with np.save or np.savez"
        ) from error
    if array.ndim == 0 or len(array) == 0:
        raise SourceError(f"the array in {path} is empty: save one of shape (N, ...)")
    return ArraySamples(_fitted(array, shape, path))


def _fitted(
    array: np.ndarray[Any, Any], shape: tuple[int, ...] | None, path: Path
) -> np.ndarray[Any, Any]:
    if array.ndim == 3 and (shape is None or len(shape) == 4):
        array = array[:, None]
    if shape is None or array.shape[1:] == shape[1:]:
        return array
    if array.ndim == 4 and np.moveaxis(array, -1, 1).shape[1:] == shape[1:]:
        return np.moveaxis(array, -1, 1)
    raise SourceError(
        f"the samples in {path} have the shape {array.shape[1:]}, but the model's input has "
        f"{shape[1:]}: give another --input-shape or resize the array"
    )
