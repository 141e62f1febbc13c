"""Channel numbers behind an operation, from those in front of it.

A label is an int64 tensor of a value's shape: the channel of each element, `FIXED` where its size must stay and
`ZERO` where the element is zero, whose size is any. `label_behind` knows the operations f with f(s x) = s f(x) for
every positive s of a channel, and refuses the others with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from sqakd_fx.ir.op_table import Kind, Op, shape_of
from sqakd_fx.ir.paddings import pad_amounts

FIXED = -1
ZERO = -2


class Refusal(Exception):
    """Channels cannot change their size here; `channels` are those concerned, None for all."""

    def __init__(self, reason: str, channels: Tensor | None = None) -> None:
        super().__init__(reason)
        self.channels = channels


def input_channels(label: Tensor, axis: int) -> Tensor | None:
    """The one channel at each position of an axis, int64; None where a position has several."""
    others = [i for i in range(label.ndim) if i != axis % label.ndim]
    one = _only_channel(label, others)
    return None if one is None else one.reshape(-1).clamp_min(FIXED)


def _only_channel(label: Tensor, axes: list[int]) -> Tensor | None:
    """The one channel along `axes`, which become of size 1, but for zeros; None where there are several."""
    highest = label.amax(axes, keepdim=True)
    return highest if bool(((label == highest) | (label == ZERO)).all()) else None


def label_behind(
    node: fx.Node,
    op: Op | None,
    given: Mapping[fx.Node, object],
    modules: Mapping[str, nn.Module],
) -> object:
    """The label of what `node` gives; `given` are the labels of those inputs that have one.

    Raises:
        Refusal: the operation does not keep the ratios of a channel's values, or joins channels.
    """
    if node.op == "output":
        raise Refusal("they are an output of the model")
    if op is None:
        raise Refusal(f"{node.name} reads them")
    shape = shape_of(node)
    first = given.get(node.all_input_nodes[0])
    if op.keeps_ratios or _is_relu(node, op):
        return first
    if op.kind is Kind.CLIP:
        raise Refusal(f"{op.name} clips every channel at the same value ({node.name})")
    if op.kind in (Kind.SUM, Kind.PRODUCT) or op.divides:
        return _of_arithmetic(node, op, given)
    if op.weighed is not None:
        return _of_attention(node, op.weighed, given, shape or ())
    if op.kind is Kind.AVERAGE or op.interpolates:
        return _over_space(node, op, first, shape or ())
    if op.kind is Kind.TRANSPARENT or op.concatenates:
        return _moved(node, op, given, modules)
    raise Refusal(f"{op.name} does not keep the sizes of channels ({node.name})")


def _is_relu(node: fx.Node, op: Op) -> bool:
    """True for a clip between arguments, which are 0 and nothing."""
    if op.kind is not Kind.CLIP or node.op != "call_function" or len(node.args) < 3:
        return False
    return node.args[1] in (0, 0.0) and node.args[2] in (None, float("inf"))


def _of_arithmetic(node: fx.Node, op: Op, given: Mapping[fx.Node, object]) -> Tensor:
    """Sums of what has the same channels; products and quotients with what has none."""
    shape = shape_of(node) or ()
    labels = [x for x in given.values() if isinstance(x, Tensor)]
    terms = [a for a in node.args[:2] if isinstance(a, fx.Node)]
    if op.kind is Kind.SUM:
        same = len(terms) == len(node.args[:2]) and all(term in given for term in terms)
        if not same or any(not torch.equal(labels[0], other) for other in labels[1:]):
            raise Refusal(f"{node.name} adds what keeps its size")
    elif len(given) > 1 or (len(terms) == 2 and terms[0] is terms[1]):
        raise Refusal(f"{node.name} multiplies two of them")
    elif op.divides and node.args[0] not in given:
        raise Refusal(f"{node.name} divides by them")
    elif op.divides and node.kwargs:
        raise Refusal(f"{node.name} rounds them")
    return labels[0].expand(shape)


def _of_attention(
    node: fx.Node, value: int, given: Mapping[fx.Node, object], shape: tuple[int, ...]
) -> Tensor:
    """A product of matrices: channels go through along the axis that is not summed over.

    `value` is the position of the argument whose rows are added up.
    """
    scored = [given[a] for a in node.args[:2] if isinstance(a, fx.Node) and a in given]
    if value == 2 and scored:
        channels = torch.cat([x.reshape(-1) for x in scored if isinstance(x, Tensor)])
        raise Refusal(f"the scores of {node.name} depend on them", channels)
    if len(given) > 1 or len(node.args) <= value:
        raise Refusal(f"{node.name} multiplies two of them")
    ((source, label),) = given.items()
    assert isinstance(label, Tensor)
    if source is node.args[value] and node.args.count(source) == 1 and label.ndim == len(shape):
        summed, kept = label, label[..., :1, :]
    elif value == 1 and source is node.args[0] and source is not node.args[1]:
        summed, kept = label, label[..., :, :1]
    else:
        raise Refusal(f"the scores of {node.name} depend on them")
    fits = label.ndim == len(shape) and kept.shape[:-2] == shape[:-2]
    if not fits or bool((summed != kept).any()):
        raise Refusal(f"{node.name} sums over several of them")
    return kept.expand(shape)


def _over_space(node: fx.Node, op: Op, label: object, shape: tuple[int, ...]) -> Tensor:
    """Averages and interpolations over the axes behind the channels."""
    assert isinstance(label, Tensor)
    axes = list(range(2, label.ndim))
    if op.is_mean:
        given = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        listed = [given] if isinstance(given, int) else given
        if not isinstance(listed, list | tuple):
            raise Refusal(f"{node.name} averages over several of them")
        axes = [int(axis) % label.ndim for axis in listed]  # type: ignore[call-overload]
    kept = _only_channel(label, axes) if axes else None
    if kept is None:
        raise Refusal(f"{node.name} averages over several of them")
    if len(shape) < label.ndim:
        kept = kept.amax(axes)
    return kept.expand(shape)


def _moved(
    node: fx.Node,
    op: Op,
    given: Mapping[fx.Node, object],
    modules: Mapping[str, nn.Module],
) -> object:
    """The operation itself, on channel numbers in place of values."""
    label = given.get(node.all_input_nodes[0])
    shape = shape_of(node)
    if op.by_shape is not None and isinstance(label, Tensor) and shape:
        return op.by_shape(label, shape)
    if op.pads:
        amounts = pad_amounts(node)
        if amounts is None or not isinstance(label, Tensor):
            raise Refusal(f"{node.name} pads them with a value of its own")
        return torch.nn.functional.pad(label, amounts, value=ZERO)

    def value_of(source: fx.Node) -> Any:
        if source in given:
            return torch.utils._pytree.tree_map(_as_values, given[source])
        size = shape_of(source)
        if not op.concatenates or size is None:
            raise Refusal(f"{node.name} depends on more than them")
        return torch.full(size, float(FIXED), dtype=torch.float64)

    args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
    target: Any = node.target
    if node.op == "call_module":
        moved = modules[target](*args, **kwargs)
    elif node.op == "call_method":
        moved = getattr(args[0], target)(*args[1:], **kwargs)
    else:
        moved = target(*args, **kwargs)
    return torch.utils._pytree.tree_map(_as_label, moved)


def _as_values(label: Any) -> Any:
    return label.double() if isinstance(label, Tensor) else label


def _as_label(values: Any) -> Any:
    return values.long() if isinstance(values, Tensor) else values
