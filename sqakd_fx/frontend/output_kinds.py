"""What each output of a model is: class scores, probabilities, embeddings or other values.

Evidence, strongest first: labels, values on the example (they sum to one, lie within 0 and 1, have unit norm), the
operation that makes the output, its name and its module's name, its shape. What stays open is taken for scores that
may be values as well, and trained as both.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten_with_path

from sqakd_fx.frontend.joined_outputs import Parts, unlike_parts
from sqakd_fx.frontend.output_names import output_key
from sqakd_fx.ir import meta
from sqakd_fx.ir.op_table import Kind, Nature, Op, op_of
from sqakd_fx.ir.outputs import class_axis, parts_axis
from sqakd_fx.recipe.keys import LossKind, Recipe, setting_of

_LOSSES: Mapping[Nature, LossKind] = {
    "classes": "kl",
    "probabilities": "probabilities",
    "independent probabilities": "bce",
    "embedding": "cosine",
    "values": "mse",
    "scores": "kl+mse",
}
_CLASS_WORDS = re.compile(r"logits?|cls|class|classes|classifier|classification|segmentation")
_VALUE_WORDS = re.compile(
    r"b?box(es)?|reg|regress(ion|or)|loc|offsets?|deltas?|landmarks?|keypoints?|depth|disparity|flow|hidden|states?|"
    r"embed(ding)?s?|features?|pool(er|ed)|images?|noise|recon(struct(ion|ed))?|audio|wave(form)?|mel"
)
_CLOSE = 1e-3
T = TypeVar("T")


@dataclass(frozen=True)
class OutputKind:
    """One floating-point output.

    Attributes:
        name: as the file and the recipe call it.
        key: as training calls it (`output_key`), another name for the recipe.
        index: among all tensors that the model returns.
        shape: on the example.
        nature: what it was taken for.
        axis: of the classes; None where there are none.
        loss: that training minimizes on it.
        evidence: why, in a few words.
        parts: sizes of the unlike parts that it joins; none where it is one.
        part_natures: what each of them is.
    """

    name: str
    key: str
    index: int
    shape: tuple[int, ...]
    nature: Nature
    axis: int | None
    loss: LossKind
    evidence: str
    parts: tuple[int, ...] = ()
    part_natures: tuple[str, ...] = ()

    @property
    def natures(self) -> tuple[str, ...]:
        """What each part is; of an output that is one part, its nature."""
        return self.part_natures or (self.nature,)

    @property
    def sentence(self) -> str:
        """One line for a run's notes, with the recipe line that changes it."""
        at = "" if self.axis is None else f" on axis {self.axis}"
        other = "kl" if self.loss == "mse" else "mse"
        return (
            f"output {self.name} {self.shape}: {_SAID[self.nature]}{at} ({self.evidence}), loss {self.loss}; "
            f'change it by loss = {{"{self.name}" = "{other}"}}'
        )

    @property
    def description(self) -> str:
        """What it is trained as, in words: the same when the recipe with all losses is read again."""
        said, has_axis = _TRAINED_AS[self.loss]
        return f"{said} on axis {self.axis}" if has_axis and self.axis is not None else said


_SAID: Mapping[Nature, str] = {
    "classes": "class scores",
    "probabilities": "probabilities of classes",
    "independent probabilities": "independent probabilities",
    "embedding": "unit vectors",
    "values": "values",
    "scores": "scores or values",
}


_TRAINED_AS: Mapping[LossKind, tuple[str, bool]] = {
    "kl": ("class scores", True),
    "probabilities": ("probabilities of classes", True),
    "bce": ("independent probabilities", False),
    "kl+mse": ("scores or values", True),
    "mse": ("values", False),
    "cosine": ("unit vectors", False),
    "none": ("not trained on", False),
}
"""By the loss, and whether it has an axis of classes."""


def named_outputs(output: Any) -> list[tuple[str, Tensor]]:
    """(key, tensor) of all floating-point outputs, in order; `with_outputs` gives a recipe these keys."""
    return [(key, tensor) for key, _, tensor in _numbered(output)]


def _numbered(output: Any) -> list[tuple[str, int, Tensor]]:
    """(key, index among all tensors, tensor) of all floating-point outputs."""
    leaves = [
        (path, leaf) for path, leaf in tree_flatten_with_path(output)[0] if isinstance(leaf, Tensor)
    ]
    return [
        (output_key(path, index, len(leaves)), index, leaf)
        for index, (path, leaf) in enumerate(leaves)
        if leaf.is_floating_point()
    ]


def decide_outputs(
    graph_module: fx.GraphModule,
    inputs: Sequence[Tensor],
    recipe: Recipe,
    labels: Any = None,
    answers: Sequence[Tensor] = (),
) -> tuple[OutputKind, ...]:
    """What each floating-point output of a float graph is, from its values on `inputs`.

    `labels` are those of a batch, and `answers` all tensors that the graph gives for it: classes are right more often
    than by chance. What the recipe says of an output holds.
    """
    running = fx.Interpreter(graph_module, garbage_collect_values=False)
    with torch.no_grad():
        outputs = _numbered(running.run(*inputs))
    makers = {
        id(v): n for n, v in running.env.items() if isinstance(v, Tensor) and n.op != "output"
    }
    modules = dict(graph_module.named_modules())
    joined = unlike_parts(graph_module.graph, modules)
    given = {id(value): answers[index] for _, index, value in outputs} if answers else {}
    labelled = _labelled([value for _, _, value in outputs], labels, given)
    names = dict(enumerate(meta.output_names(graph_module.graph.output_node())))
    found: list[OutputKind] = []
    for key, index, value in outputs:
        maker = _maker(makers.get(id(value)), modules)
        known = _Known(
            names.get(index, key),
            key,
            index,
            value.detach().float(),
            None if maker is None else op_of(maker, modules),
            "" if maker is None else meta.module_path(maker),
            tuple(x for x in inputs if x.is_floating_point()),
            labels if value is labelled else None,
            _parts(joined, makers.get(id(value)), tuple(value.shape)),
        )
        found.append(_told(known, recipe))
    return tuple(_beside_probabilities(found))


def _labelled(
    outputs: Sequence[Tensor], labels: Any, answers: Mapping[int, Tensor]
) -> Tensor | None:
    """The output that labels are of: the first whose classes they number, best with as many classes as there are."""
    if not isinstance(labels, Tensor) or not outputs:
        return None
    fits = {id(value): _by_labels(tuple(value.shape), labels) for value in outputs}
    fitting = [
        value
        for value in outputs
        if (fit := fits[id(value)]) is not None
        and (fit.axis is None or _is_right(answers.get(id(value)), labels, fit.axis))
    ]

    def exact(value: Tensor) -> bool:
        found = fits[id(value)]
        axis = None if found is None else found.axis
        return axis is not None and value.shape[axis] == int(labels.max()) + 1

    return next(filter(exact, fitting), fitting[0] if fitting else None)


def _is_right(answer: Tensor | None, labels: Tensor, axis: int) -> bool:
    """Whether the largest scores are half of the labels, or more of them than by chance.

    More is by two standard deviations and one. Chance is that of scores which do not know the labels: an embedding
    whose first number is often its largest meets label 0 often.
    """
    if answer is None:
        return True
    known = labels.to(answer.device).flatten()
    guessed = answer.argmax(axis).flatten()
    guessed, known = guessed[known >= 0], known[known >= 0]
    classes = answer.shape[axis]
    counts = [one.bincount(minlength=classes).double() for one in (guessed, known)]
    by_chance = float(counts[0] @ counts[1]) / max(len(known), 1)
    right = int((guessed == known).sum())
    return 2 * right > len(known) or right > by_chance + 2 * by_chance**0.5 + 1


def _beside_probabilities(outputs: Sequence[OutputKind]) -> Iterator[OutputKind]:
    """A model that makes probabilities of one output itself leaves values in the others, not scores."""
    made = [one.name for one in outputs if "probabilities" in one.nature]
    for one in outputs:
        if made and one.nature == "scores" and one.loss == _LOSSES["scores"]:
            why = f"the model makes probabilities itself, as {made[0]}"
            yield replace(one, nature="values", axis=None, loss=_LOSSES["values"], evidence=why)
        else:
            yield one


def class_axes(outputs: Iterable[OutputKind]) -> dict[int, int]:
    """The axis of the classes by the output's index among all tensors, where it has classes."""
    return {one.index: one.axis for one in outputs if one.axis is not None}


def with_outputs(recipe: Recipe, outputs: Sequence[OutputKind]) -> Recipe:
    """The recipe with the loss and the class axis of each output by its key, in front of what it said."""
    globs = recipe.loss if isinstance(recipe.loss, Mapping) else {}
    loss = {glob.escape(one.key): one.loss for one in outputs}
    loss |= {key: value for key, value in globs.items() if key not in loss}
    axes = {glob.escape(one.key): one.axis for one in outputs if one.axis is not None}
    parts = {glob.escape(one.key): one.parts for one in outputs if one.parts}
    parts |= {key: value for key, value in (recipe.parts or {}).items() if key not in parts}
    update = {"loss": loss, "class_axis": axes, "parts": parts or None}
    return recipe.model_copy(update=update)


@dataclass(frozen=True)
class _Known:
    """What is known of one output: `made_by` is the operation behind it, `module` the path of the user's module."""

    name: str
    key: str
    index: int
    value: Tensor
    made_by: Op | None
    module: str
    inputs: tuple[Tensor, ...]
    labels: Tensor | None
    joined: Parts | None

    @property
    def parts(self) -> tuple[int, ...]:
        return () if self.joined is None else self.joined.sizes

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)


@dataclass(frozen=True)
class _Found:
    nature: Nature
    axis: int | None
    evidence: str


def _told(known: _Known, recipe: Recipe) -> OutputKind:
    """What the recipe says of an output, else what the evidence does."""
    found = _found(known)
    loss: LossKind = _said_of(recipe.loss, known) or "auto"  # type: ignore[assignment]
    axis = _said_of(recipe.class_axis, known)
    if axis is not None:
        found = _Found("classes", axis % max(len(known.shape), 1), "the recipe's class_axis")
    elif loss == "kl" and found.nature not in ("classes", "scores"):
        by_shape = class_axis(known.shape)
        last = len(known.shape) - 1
        found = _Found("classes", last if by_shape is None else by_shape, "the recipe's loss")
    decided: LossKind = _LOSSES[found.nature] if loss == "auto" else loss  # type: ignore[assignment]
    parts = tuple(_said_of(recipe.parts, known) or known.parts)
    natures = (
        known.joined.natures if known.joined and parts == known.parts else ("values",) * len(parts)
    )
    return OutputKind(
        known.name,
        known.key,
        known.index,
        known.shape,
        found.nature,
        found.axis,
        decided,
        found.evidence,
        parts,
        natures if parts_axis(known.shape, parts) is not None else (),
    )


def _said_of(value: T | Mapping[str, T] | None, known: _Known) -> T | None:
    """What the recipe says of an output under its name, else under its key."""
    if value is None:
        return None
    said = setting_of(value, known.name)
    return setting_of(value, known.key) if said is None else said


def _found(known: _Known) -> _Found:
    if known.labels is not None:
        labelled = _by_labels(known.shape, known.labels)
        if labelled is not None:
            told = _by_values(known)
            return told if told is not None and told.nature == "probabilities" else labelled
    if known.parts:
        *first, last = map(str, known.parts)
        sizes = f"{', '.join(first)} and {last}"
        return _Found("values", None, f"it joins values and probabilities, {sizes} wide")
    for decide in (_by_values, _by_operation, _by_name, _by_shape):
        found = decide(known)
        if found is not None:
            return found
    return _Found("scores", class_axis(known.shape), "nothing tells class scores from values")


def _by_labels(shape: tuple[int, ...], labels: Tensor) -> _Found | None:
    """Labels that number the classes of an output, or are values of its form."""
    inner = shape[1:]
    if tuple(labels.shape[1:]) == inner and labels.is_floating_point():
        return _Found("values", None, "labels are such values")
    if labels.is_floating_point() or labels.dtype == torch.bool or not labels.numel():
        return None
    for axis in _axes(shape):
        others = inner[: axis - 1] + inner[axis:]
        if tuple(labels.shape[1:]) == others and int(labels.max()) < shape[axis]:
            return _Found("classes", axis, "labels number its classes")
    return None


def _axes(shape: tuple[int, ...]) -> list[int]:
    """Axes where classes may be, the likeliest first."""
    likely = (class_axis(shape), len(shape) - 1, 1)
    return [
        a for a in dict.fromkeys(likely) if a is not None and 0 < a < len(shape) and shape[a] > 1
    ]


def _by_values(known: _Known) -> _Found | None:
    value = known.value
    if not value.numel() or not bool(value.isfinite().all()):
        return None
    if bool((value >= -_CLOSE).all()):
        for axis in _axes(known.shape):
            if bool(((value.sum(axis) - 1).abs() < _CLOSE).all()):
                return _Found("probabilities", axis, "they sum to one")
    has_rows = value.ndim > 1 and value.shape[-1] > 1
    if has_rows and bool(((value.norm(dim=-1) - 1).abs() < _CLOSE).all()):
        return _Found("embedding", None, "each row has norm one")
    return None


def _by_operation(known: _Known) -> _Found | None:
    """What the last operation says; a sigmoid also makes images and boxes between 0 and 1."""
    op = known.made_by
    if op is None or op.gives in (None, "probabilities"):
        return None
    if op.gives == "independent probabilities" and class_axis(known.shape) is not None:
        told = _by_name(known) or _by_shape(known)
        if told is not None and told.nature == "values":
            return told
    axis = class_axis(known.shape) if op.gives == "classes" else None
    return _Found(op.gives, axis, f"{op.name} makes it")


def _by_name(known: _Known) -> _Found | None:
    """Words in the output's name, else in the path of the module that makes it."""
    for text, what in ((known.name, "its name"), (known.module, f"module {known.module}")):
        words = re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", text).lower())
        if any(map(_VALUE_WORDS.fullmatch, words)):
            return _Found("values", None, what)
        axis = class_axis(known.shape)
        if axis is not None and any(map(_CLASS_WORDS.fullmatch, words)):
            return _Found("classes", axis, what)
    return None


def _by_shape(known: _Known) -> _Found | None:
    shape = known.shape
    if class_axis(shape) is None:
        return _Found("values", None, "its shape has no classes")
    if len(shape) == 3 and shape[2] == 4:
        return _Found("values", None, "four numbers a row, as boxes have")
    if any(_is_like(shape, tuple(x.shape)) for x in known.inputs):
        return _Found("values", None, "it has the form of an input")
    return None


def _is_like(shape: tuple[int, ...], given: tuple[int, ...]) -> bool:
    """Whether an output has the axes of an input, or is an image of a multiple of its size."""
    if len(shape) < 3 or len(shape) != len(given) or shape[1] != given[1]:
        return False
    return all(
        ours >= theirs and ours % theirs == 0
        for ours, theirs in zip(shape[2:], given[2:], strict=True)
    )


def _parts(
    joined: Mapping[fx.Node, Parts], node: fx.Node | None, shape: tuple[int, ...]
) -> Parts | None:
    """The unlike parts of an output that a node makes, where their sizes tell their axis."""
    parts = None if node is None else joined.get(node)
    if parts is None or parts_axis(shape, parts.sizes) != parts.axis % len(shape):
        return None
    return parts


def _maker(node: fx.Node | None, modules: Mapping[str, nn.Module]) -> fx.Node | None:
    """The operation that computes a value, behind what only moves it."""
    while node is not None and node.all_input_nodes:
        op = op_of(node, modules)
        if op is None or op.kind not in (Kind.TRANSPARENT, Kind.JOINT, Kind.NOISE):
            break
        node = node.all_input_nodes[0]
    return node
