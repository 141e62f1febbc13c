"""What the student minimises: its distance from the teacher's output, without labels.

    L = T² · mean over the batch of KL( softmax(z_teacher / T) ‖ softmax(z_student / T) )

(SQAKD, section 3; T = 4 in every run of the paper.) Outputs that are not class scores get the mean
squared error relative to the teacher's variance, or the cosine distance for embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from sqakd_fx.recipe import Recipe

Loss = Callable[[Tensor, Tensor], Tensor]


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float, axis: int) -> Tensor:
    """Scalar KL loss; logits of any shape with the classes on `axis`, mean over everything else."""
    log_student = F.log_softmax(student.float() / temperature, dim=axis)
    log_teacher = F.log_softmax(teacher.float() / temperature, dim=axis)
    divergence = F.kl_div(log_student, log_teacher, reduction="none", log_target=True)
    return divergence.sum(dim=axis).mean() * temperature**2


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error over the teacher's variance; scale-free."""
    teacher = teacher.float()
    spread = teacher.var(correction=0) + 1e-12
    return F.mse_loss(student.float(), teacher) / spread


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of 1 - cosine over the last axis."""
    return (1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)).mean()


def class_axis(shape: tuple[int, ...]) -> int | None:
    """Where the classes of an output are: (N, C), (N, C, H, W), (N, T, C); None where there are none."""
    if len(shape) == 2:
        return 1 if shape[1] > 1 else None
    if len(shape) == 3:
        return 2
    if len(shape) in (4, 5):
        return 1 if shape[1] > 1 else None
    return None


def output_loss(recipe: Recipe, shape: tuple[int, ...]) -> Loss:
    """The loss of one output tensor, chosen from its shape unless the recipe says."""
    axis = recipe.class_axis if recipe.class_axis is not None else class_axis(shape)
    kind: Literal["auto", "kl", "mse", "cosine"] = recipe.loss
    if kind == "auto":
        kind = "mse" if axis is None else "kl"
    if kind == "kl":
        return lambda s, t: kl_divergence(s, t, recipe.temperature, -1 if axis is None else axis)
    return relative_error if kind == "mse" else cosine_distance


def distillation_loss(recipe: Recipe) -> Callable[[Any, Any], Tensor]:
    """Sum of the losses of all floating-point outputs, in nested tuples, lists and dicts."""

    def loss(student: Any, teacher: Any) -> Tensor:
        pairs = zip(
            torch.utils._pytree.tree_leaves(student),
            torch.utils._pytree.tree_leaves(teacher),
            strict=True,
        )
        terms = [
            output_loss(recipe, tuple(t.shape))(s, t)
            for s, t in pairs
            if isinstance(t, Tensor) and t.is_floating_point()
        ]
        return torch.stack(terms).sum() if len(terms) > 1 else terms[0]

    return loss


def agreement(student: Any, teacher: Any) -> Tensor:
    """Share of predictions that are the same (first output); for outputs without classes, 1 - error."""
    s = next(x for x in torch.utils._pytree.tree_leaves(student) if isinstance(x, Tensor))
    t = next(x for x in torch.utils._pytree.tree_leaves(teacher) if isinstance(x, Tensor))
    axis = class_axis(tuple(t.shape))
    if axis is None:
        return 1 - relative_error(s, t)
    return (s.argmax(dim=axis) == t.argmax(dim=axis)).float().mean()
