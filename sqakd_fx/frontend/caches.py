"""Caches that a generating model returns beside its outputs: keys and values for the next call, no output of a file.

before   {"logits": logits, "past_key_values": DynamicCache}
after    {"logits": logits}
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

_NAMES = ("past_key_values", "cache_params")


def caches_in(output: Any) -> tuple[str, ...]:
    """The names of an output's caches: their keys, or the names of their classes."""
    return tuple(
        type(value).__name__ if isinstance(key, int) else str(key)
        for key, value in _parts(output)
        if _is_cache(key, value)
    )


@contextlib.contextmanager
def without_caches(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Inside, the model leaves its caches out of its output, and makes none where its configuration can say so."""
    if not names:
        yield
        return
    configs = [config for module in model.modules() if (config := _using_cache(module))]
    hook = model.register_forward_hook(lambda module, args, output: outputs_alone(output))
    for config in configs:
        config.use_cache = False
    try:
        yield
    finally:
        hook.remove()
        for config in configs:
            config.use_cache = True


def outputs_alone(output: Any) -> Any:
    """An output without its caches."""
    caches = [key for key, value in _parts(output) if _is_cache(key, value)]
    if not caches:
        return output
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return dataclasses.replace(output, **dict.fromkeys(caches))
    if isinstance(output, Mapping):
        return {key: value for key, value in output.items() if key not in caches}
    return tuple(value for key, value in enumerate(output) if key not in caches)


def _using_cache(module: nn.Module) -> Any:
    config = getattr(module, "config", None)
    return config if getattr(config, "use_cache", None) is True else None


def _parts(output: Any) -> list[tuple[Any, Any]]:
    if isinstance(output, Mapping):
        return list(output.items())
    if dataclasses.is_dataclass(output):
        return [(field.name, getattr(output, field.name)) for field in dataclasses.fields(output)]
    return list(enumerate(output)) if isinstance(output, tuple | list) else []


def _is_cache(key: Any, value: Any) -> bool:
    of_cache = any(kind.__name__.endswith("Cache") for kind in type(value).__mro__)
    return value is not None and (of_cache or key in _NAMES)
