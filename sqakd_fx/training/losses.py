"""What the student minimizes: its distance from the teacher's output, without labels.

    L = T² · mean over the batch of KL( softmax(z_teacher / T) ‖ softmax(z_student / T) )

(SQAKD, section 3; T = 4 in every run of the paper.) Outputs that are not class scores get the mean
squared error relative to the teacher's variance, or the cosine distance for unit vectors; probabilities their
KL. `frontend/output_kinds.py` decides what an output is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sqakd_fx.engine.distributed import is_distributed, variance_of_all
from sqakd_fx.errors import RecipeError, TrainingError
from sqakd_fx.frontend.output_kinds import named_outputs
from sqakd_fx.ir.outputs import class_axis, parts_axis, separated, tensors_of
from sqakd_fx.recipe.keys import Recipe, setting_of

Loss = Callable[[Tensor, Tensor], Tensor]
_LEAST = 1e-6
"""Least probability: float32 has no 1 - p below 6e-8, whose logarithm a gradient divides by."""


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float, axis: int) -> Tensor:
    """Scalar KL loss; logits of any shape with the classes on `axis`, mean over everything else."""
    log_student = F.log_softmax(student.float() / temperature, dim=axis)
    log_teacher = F.log_softmax(teacher.float() / temperature, dim=axis)
    divergence = F.kl_div(log_student, log_teacher, reduction="none", log_target=True)
    return divergence.sum(dim=axis).mean() * temperature**2


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error over the teacher's variance; scale-free."""
    return _over_variance(student, teacher, teacher.float().var(correction=0))


def share_of_relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """This process's part of the relative error of the whole batch: all processes call it together."""
    if not is_distributed():
        return relative_error(student, teacher)
    return _over_variance(student, teacher, variance_of_all(teacher.float()))


def _over_variance(student: Tensor, teacher: Tensor, variance: Tensor) -> Tensor:
    return F.mse_loss(student.float(), teacher.float()) / (variance + 1e-12)


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of 1 - cosine over the last axis."""
    return (1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)).mean()


def kl_of_probabilities(student: Tensor, teacher: Tensor, temperature: float, axis: int) -> Tensor:
    """`kl_divergence` of what has been through a softmax: its logarithms are scores up to a constant."""
    least = torch.finfo(torch.float32).tiny
    ours, theirs = (x.float().clamp_min(least).log() for x in (student, teacher))
    return kl_divergence(ours, theirs, temperature, axis)


def binary_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean KL of independent probabilities, each of one yes or no; 0 where both are equal."""
    ours, theirs = (x.float().clamp(_LEAST, 1 - _LEAST) for x in (student, teacher))
    entropy = F.binary_cross_entropy(theirs, theirs)
    return F.binary_cross_entropy(ours, theirs) - entropy


def output_loss(recipe: Recipe, shape: tuple[int, ...], name: str = "output") -> Loss | None:
    """The loss of one output tensor as the recipe says; None for none. Where it says nothing, the shape decides."""
    axis = judged_axis(recipe, shape, name)
    kind = setting_of(recipe.loss, name) or "auto"
    if kind == "auto":
        kind = "mse" if axis is None else "kl"
    along = -1 if axis is None else axis
    sizes = parts_of(recipe, name)

    def kl(s: Tensor, t: Tensor) -> Tensor:
        return kl_divergence(s, t, recipe.temperature, along)

    losses: Mapping[str, Loss | None] = {
        "kl": kl,
        "probabilities": lambda s, t: kl_of_probabilities(s, t, recipe.temperature, along),
        "bce": binary_divergence,
        "kl+mse": lambda s, t: kl(s, t) + share_of_relative_error(s, t),
        "mse": lambda s, t: _summed_over_parts(s, t, sizes),
        "cosine": cosine_distance,
        "none": None,
    }
    return losses[kind]


def parts_of(recipe: Recipe, name: str) -> tuple[int, ...]:
    """Sizes of the unlike parts that an output joins; none where it is one."""
    return setting_of(recipe.parts or {}, name) or ()


def _summed_over_parts(student: Tensor, teacher: Tensor, sizes: Sequence[int]) -> Tensor:
    pairs = zip(separated(student, sizes), separated(teacher, sizes), strict=True)
    terms = [share_of_relative_error(s, t) for s, t in pairs]
    return torch.stack(terms).sum() if len(terms) > 1 else terms[0]


def judged_axis(recipe: Recipe, shape: tuple[int, ...], name: str) -> int | None:
    """The axis of an output's classes as the recipe says, by its shape where it says nothing; None for no classes."""
    if recipe.class_axis is None:
        return class_axis(shape)
    return setting_of(recipe.class_axis, name)


def check_output_settings(recipe: Recipe, output: Any, names: Sequence[str] = ()) -> None:
    """Raises RecipeError where a loss is named for an output that the model has not, or no loss is left.

    `names` are the outputs' own, in order, where these are not their keys.
    """
    found = named_outputs(output)
    keys = [key for key, _ in found]
    names = names or keys
    for key in ("loss", "class_axis", "parts"):
        value = getattr(recipe, key)
        for glob in value if isinstance(value, Mapping) else ():
            if not any(fnmatchcase(name, glob) for name in (*names, *keys)):
                raise RecipeError(
                    f"the recipe's {key} names an output {glob!r} that the model has not: "
                    f"its outputs are {', '.join(names)}"
                )
    for name, x in found:
        sizes = parts_of(recipe, name)
        if sizes and parts_axis(tuple(x.shape), sizes) is None:
            raise RecipeError(
                f"the recipe's parts of output {name!r} add up to {sum(sizes)}, and no axis of its shape "
                f"{tuple(x.shape)} behind the batch has that size: give sizes that add up to one"
            )
    if all(output_loss(recipe, tuple(x.shape), name) is None for name, x in found):
        raise RecipeError(_nothing_to_train_on(tensors_of(output)))


def _nothing_to_train_on(outputs: Sequence[Tensor]) -> str:
    if any(x.is_floating_point() for x in outputs):
        return "the recipe's loss leaves out every output: keep one to train on"
    if any(x.is_complex() for x in outputs):
        return "the model returns complex numbers, which no file gives: return torch.view_as_real(...) of them"
    kind = str(outputs[0].dtype).removeprefix("torch.")
    return (
        f"the model returns {kind} tensors, which nothing can be trained on: return the scores in front of them as "
        "well, or instead"
    )


def distillation_loss(recipe: Recipe) -> Callable[[Any, Any], Tensor]:
    """Sum of the losses of all floating-point outputs, in nested tuples, lists and dicts."""

    def loss(student: Any, teacher: Any) -> Tensor:
        terms = []
        for (name, t), (_, s) in zip(named_outputs(teacher), named_outputs(student), strict=True):
            of_output = output_loss(recipe, tuple(t.shape), name)
            if of_output is not None:
                terms.append(of_output(s, t))
        return torch.stack(terms).sum() if len(terms) > 1 else terms[0]

    return loss


def cross_entropy(output: Any, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the first output with labels: int64 classes of the output's shape without them.

    Raises:
        TrainingError: the output has no classes, or the labels have another shape.
    """
    name, scores = named_outputs(output)[0]
    axis = class_axis(tuple(scores.shape))
    wanted = () if axis is None else scores.shape[:axis] + scores.shape[axis + 1 :]
    if axis is None or labels.shape != wanted or labels.is_floating_point():
        raise TrainingError(
            f"labels of shape {tuple(labels.shape)} do not fit output {name!r} of shape "
            f"{tuple(scores.shape)}: give class numbers, or leave labels = 0"
        )
    return F.cross_entropy(scores.float().movedim(axis, 1), labels.long())
