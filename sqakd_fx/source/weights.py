"""A file of weights for a model: safetensors, or a pickle of tensors only."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sqakd_fx.diagnostics.wording import require_exists, with_article
from sqakd_fx.errors import SourceError, short

_STATE_KEYS = ("state_dict", "model_state_dict", "model")


def load_weights(model: nn.Module, path: Path) -> None:
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
    require_exists(path, "--weights")
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
            f"the weights in {path} are {with_article(type(loaded).__name__)}, not a state dict "
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
