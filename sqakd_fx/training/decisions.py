"""How a run is carried out: which of the things that a recipe asks for are done, and why others are not."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx, nn

from sqakd_fx.diagnostics.wording import no_effect
from sqakd_fx.engine.activation_checkpointing import checkpointed
from sqakd_fx.engine.compilation import wants_compiling, why_uncompiled
from sqakd_fx.engine.distributed import is_distributed
from sqakd_fx.engine.sharded_teacher import sharded
from sqakd_fx.recipe.keys import Recipe
from sqakd_fx.training.features import TrainingPair
from sqakd_fx.training.step_batches import StepBatches


@dataclass(frozen=True)
class Decisions:
    """What a run does; `notes` are sentences for the user."""

    shard_teacher: bool
    checkpoint_activations: bool
    cache_teacher: bool
    compile: bool
    notes: tuple[str, ...]


def decide(
    student: fx.GraphModule, pair: TrainingPair, batches: StepBatches, *, keeps_outputs: bool
) -> Decisions:
    """What is done of what the recipe asks for.

    `pair` is the student and its teacher as they would be trained. `keeps_outputs` says whether there is a
    folder for the teacher's outputs.
    """
    recipe, device = batches.recipe, batches.device
    whole, plain = _why_whole(pair), _why_not_checkpointed()
    uncached = _why_uncached(recipe, pair)
    caches = recipe.cache_teacher and keeps_outputs
    compiles = wants_compiling(student, recipe, batches.total, batches.samples, device)
    uncompiled = why_uncompiled(recipe, device)
    notes = (
        no_effect("shard_teacher", whole) if recipe.shard_teacher and whole else None,
        no_effect("checkpoint_activations", plain)
        if recipe.checkpoint_activations and plain
        else None,
        *_without_effect(batches),
        pair.note,
        no_effect("cache_teacher", uncached) if caches and uncached else None,
        (uncompiled or _COMPILING) if compiles else None,
    )
    return Decisions(
        shard_teacher=recipe.shard_teacher and whole is None,
        checkpoint_activations=recipe.checkpoint_activations and plain is None,
        cache_teacher=caches and uncached is None,
        compile=compiles and uncompiled is None,
        notes=tuple(note for note in notes if note is not None),
    )


_COMPILING = "compiling the student and the teacher for the first step (about a minute)"


def _why_whole(pair: TrainingPair) -> str | None:
    if not is_distributed():
        return "there is one process"
    return None if isinstance(pair.teacher, fx.GraphModule) else "the teacher is no traced graph"


def _why_not_checkpointed() -> str | None:
    return "there are several processes" if is_distributed() else None


def _why_uncached(recipe: Recipe, pair: TrainingPair) -> str | None:
    if recipe.mixing != "none":
        return "mixing gives the teacher other inputs in every step"
    if recipe.feature_weight and pair.note is None:
        return "the loss needs the teacher's inner features"
    return "there are several processes" if is_distributed() else None


def _without_effect(batches: StepBatches) -> list[str]:
    """Notes on settings of the loop that change nothing in this run."""
    recipe, notes = batches.recipe, []
    if recipe.early_stop is not None and not batches.data.held_out:
        notes.append(
            no_effect("early_stop", "there are no held-out samples to measure agreement on")
        )
    if recipe.delta_refresh and recipe.delta_refresh * batches.steps_per_epoch >= batches.total:
        notes.append(no_effect("delta_refresh", "training ends before its first refresh"))
    if recipe.feature_fade and not recipe.feature_weight:
        notes.append(no_effect("feature_fade", "feature_weight is 0"))
    return notes


def carried_out(pair: TrainingPair, decided: Decisions, device: torch.device) -> TrainingPair:
    """The pair as steps call it: the teacher on the device or divided, the student in segments or not."""
    if decided.shard_teacher:
        assert isinstance(pair.teacher, fx.GraphModule)
        pair = replace(pair, teacher=sharded(pair.teacher, device))
    else:
        pair.teacher.to(device)
    if decided.checkpoint_activations:
        assert isinstance(pair.student, fx.GraphModule)
        pair = replace(pair, student=checkpointed(pair.student))
    return pair


def compilable(pair: TrainingPair, decided: Decisions) -> tuple[nn.Module, ...]:
    """What `torch.compile` takes of a pair: a divided teacher runs as it is."""
    teacher = () if decided.shard_teacher else (pair.teacher,)
    parts = (pair.student, *teacher, pair.loss)
    return tuple(part for part in parts if isinstance(part, nn.Module))
