"""Which axes of a model's inputs have sizes that the exported file leaves open, beside the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from sqakd_fx.errors import RecipeError
from sqakd_fx.recipe.input_patterns import inputs_called

FreeAxes: TypeAlias = tuple[Mapping[int, str], ...]
"""For each input, in order: the name of each free axis."""

Dynamic: TypeAlias = Mapping[str, Mapping[str, int]]
"""A recipe's `dynamic`: for each input, or glob of inputs, the axis of each name."""


def free_axes(dynamic: Dynamic, inputs: Mapping[str, Sequence[int]]) -> FreeAxes:
    """The free axes of `inputs`, the shapes of an example by name.

    Raises:
        RecipeError: no input is called so, an input has no such axis, or the example's size of it is 1 or not the same
            in every input.
    """
    found: dict[str, dict[int, str]] = {name: {} for name in inputs}
    sizes: dict[str, int] = {}
    for pattern, axes in dynamic.items():
        for name in inputs_called(pattern, inputs, "dynamic"):
            for called, axis in axes.items():
                _require_axis(name, inputs[name], called, axis)
                size = sizes.setdefault(called, inputs[name][axis])
                if size != inputs[name][axis]:
                    raise RecipeError(
                        f"dynamic calls axis {axis} of {name!r} {called!r}, and the example has {inputs[name][axis]} "
                        f"there and {size} elsewhere: give each size a name of its own"
                    )
                found[name][axis] = called
    return tuple(found.values())


def _require_axis(name: str, shape: Sequence[int], called: str, axis: int) -> None:
    if axis >= len(shape):
        raise RecipeError(
            f"dynamic frees axis {axis} of {name!r} ({called}), which has {len(shape)} axes: count from 0, the batch"
        )
    if shape[axis] < 2:
        raise RecipeError(
            f"dynamic frees axis {axis} of {name!r} ({called}), of which the example has {shape[axis]}: give "
            "example_inputs() of at least 2 there"
        )


def of_each(free: FreeAxes, count: int) -> FreeAxes:
    """The free axes of each of so many inputs, also where nothing is said of any."""
    return free or ({},) * count


def names_of(free: FreeAxes) -> str:
    """The names of all free axes, each once."""
    return ", ".join(dict.fromkeys(name for axes in free for name in axes.values()))


def free_sizes(free: FreeAxes, shapes: Sequence[Sequence[int]]) -> dict[str, int]:
    """The example's size of each name."""
    return {
        called: shape[axis]
        for axes, shape in zip(free, shapes, strict=False)
        for axis, called in axes.items()
    }


def other_sizes(sizes: Mapping[str, int]) -> list[dict[str, int]]:
    """Three choices of sizes that are not the example's: larger, larger in unlike proportions, smaller.

    They are twice, one and a half times, and half as large, so that what divides the example's divides most of them.
    """
    doubled = {name: 2 * size for name, size in sizes.items()}
    uneven = {
        name: size + size // 2 if index % 2 == 0 else 2 * size
        for index, (name, size) in enumerate(sizes.items())
    }
    halved = {name: max(size // 2, 1) for name, size in sizes.items()}
    return [doubled, uneven, halved]
