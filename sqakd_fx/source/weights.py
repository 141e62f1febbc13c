"""A file of weights for a model: safetensors, or a pickle of tensors only."""

from __future__ import annotations

import pickle
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sqakd_fx.diagnostics.wording import first_of, require_exists, with_article
from sqakd_fx.errors import SourceError, short

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Components that torch.compile and torch.distributed put into the names of what they wrap."""
_DEEPEST = 3
_AVERAGES = ("ema", "averag", "swa", "shadow", "smooth")
_NAMES_TOLD = 5


@dataclass(frozen=True)
class _Stored:
    """A state dict inside of a file; `label` are the keys and the prefix before its names, `beside` are other names."""

    label: str
    state: dict[str, Tensor]
    faults: tuple[str, ...]
    matches: int
    beside: frozenset[str]


def load_weights(model: nn.Module, path: Path) -> tuple[str, ...]:
    """Load a file of weights, whatever keys and prefixes tools have put around them.

    "FILE:KEY" takes the weights under a key, where a file holds several. Returns what to tell of what was left.

    Raises:
        SourceError: the file cannot be read, or does not hold the model's weights.
    """
    path, key = _divided(path)
    expected = model.state_dict()
    stored = _stored(_read_weights(path), expected, path)
    if key is not None:
        known = [one.label for one in stored if one.label]
        stored = [one for one in stored if one.label in (key, f"{key}.module")]
        if not stored:
            raise SourceError(
                f"{path} has no weights under the key {key!r}: "
                f"it has {first_of(known, _NAMES_TOLD)}, so give one of these"
            )
    fitting = sorted((one for one in stored if not one.faults), key=_is_average)
    if not fitting:
        best = max(stored, key=lambda one: one.matches)
        raise SourceError(
            f"the weights in {path} do not fit the model, {'; '.join(best.faults)}: "
            "give the weights of this architecture"
        )
    taken, *others = fitting
    model.load_state_dict(taken.state, strict=False)
    if key is not None:
        return ()
    return _notes(path, taken, [one for one in others if not _are_equal(one.state, taken.state)])


def _notes(path: Path, taken: _Stored, others: Sequence[_Stored]) -> tuple[str, ...]:
    if others:
        labels = [one.label for one in (taken, *others)]
        return (
            f"{path.name} holds weights of the model as {' and as '.join(labels)}: {taken.label} is taken; "
            f"--weights {path}:{others[0].label} takes the other",
        )
    beside = sorted(taken.beside - {"n_averaged"})
    if beside:
        return (
            f"of {path.name} {taken.label} is taken, without what lies beside it ({first_of(beside, _NAMES_TOLD)})",
        )
    return ()


def _divided(path: Path) -> tuple[Path, str | None]:
    """FILE:KEY as (FILE, KEY), where FILE is there."""
    file, colon, key = str(path).rpartition(":")
    return (
        (Path(file), key) if colon and not path.exists() and Path(file).exists() else (path, None)
    )


def _is_average(stored: _Stored) -> bool:
    return any(word in stored.label.lower() for word in _AVERAGES)


def _are_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _stored(loaded: Any, expected: dict[str, Tensor], path: Path) -> list[_Stored]:
    """Every state dict in a checkpoint, under every prefix that the model's names have in it."""
    if not isinstance(loaded, dict) or not loaded:
        raise SourceError(
            f"the weights in {path} are {with_article(type(loaded).__name__)}, not a state dict "
            "with tensors: save model.state_dict()"
        )
    found = []
    for keys, tensors in _tensor_dicts(loaded, ()):
        names = {_unwrapped(name, expected): tensor for name, tensor in tensors.items()}
        for prefix in _prefixes(names, expected):
            state = {k.removeprefix(prefix): v for k, v in names.items() if k.startswith(prefix)}
            label = ".".join((*keys, *prefix.split("."))).strip(".")
            matches = sum(name in state for name in expected)
            beside = frozenset(name for name in names if not name.startswith(prefix))
            found.append(_Stored(label, state, _faults(state, expected), matches, beside))
    if not found:
        raise SourceError(
            f"the weights in {path} hold {first_of(list(map(str, loaded)), _NAMES_TOLD)}, which are not tensors: "
            "save model.state_dict() alone"
        )
    return found


def _tensor_dicts(
    value: dict[Any, Any], keys: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    tensors = {k: v for k, v in value.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if tensors:
        yield keys, tensors
    for key, inner in value.items():
        if isinstance(inner, dict) and len(keys) < _DEEPEST:
            yield from _tensor_dicts(inner, (*keys, str(key)))


def _unwrapped(name: str, expected: dict[str, Tensor]) -> str:
    if name in expected:
        return name
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _prefixes(names: Collection[str], expected: dict[str, Tensor]) -> list[str]:
    """What stands in front of the model's names, nothing first: "module.", "model.", "net."."""
    known = list(expected)
    looked_for = {known[0], known[len(known) // 2], known[-1]} if known else set()
    found = [n.removesuffix(e) for e in sorted(looked_for) for n in names if n.endswith(f".{e}")]
    return list(dict.fromkeys(["", *found]))


def _faults(state: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[str, ...]:
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
    return tuple(
        f"{title} {first_of(names, _NAMES_TOLD)}"
        for title, names in (("missing", missing), ("unexpected", unexpected), ("shape of", shapes))
        if names
    )


def _read_weights(path: Path) -> Any:
    require_exists(path, "--weights")
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "not a file"
        raise SourceError(f"--weights {path} is {kind}: give a file of weights")
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
