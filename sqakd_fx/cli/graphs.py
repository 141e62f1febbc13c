"""The graphs that `inspect` shows: of a source, which is compiled again, and of a result folder as it lies there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import fx

from sqakd_fx.errors import RecipeError
from sqakd_fx.ir.copying import deep_copy
from sqakd_fx.ir.pass_manager import Pass, run_passes
from sqakd_fx.passes.fold_batch_norm import FoldBatchNorm
from sqakd_fx.passes.insert_quantizers import InsertQuantizers
from sqakd_fx.passes.lower_to_integer.lower import LowerToInteger
from sqakd_fx.passes.propagate_shapes import PropagateShapes
from sqakd_fx.passes.stable_top_k import StableTopK
from sqakd_fx.program import Program, build_program, distillation_teacher, lower
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.recipe.keys import Recipe
from sqakd_fx.results.student import SavedStudent, lowered_of
from sqakd_fx.source.source import Source

STAGES: Mapping[str, str] = {
    "traced": StableTopK.name,
    "folded": FoldBatchNorm.name,
    "quantized": InsertQuantizers.name,
    "lowered": LowerToInteger.name,
}
"""The pass behind which each stage is."""


class Graphs(Protocol):
    """A student at its stages."""

    @property
    def name(self) -> str: ...

    def at(self, place: str) -> tuple[fx.GraphModule, Program | SavedStudent]:
        """The graph at a stage, or behind the last run of a pass."""
        ...

    def program(self) -> Program | SavedStudent:
        """What is known of the student."""
        ...


@dataclass(frozen=True)
class SavedGraphs:
    """The trained student of a result folder, and what is lowered of it; the float model is not there."""

    saved: SavedStudent
    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    def at(self, place: str) -> tuple[fx.GraphModule, Program | SavedStudent]:
        name = STAGES.get(place, place)
        if name == InsertQuantizers.name:
            return self.saved.student, self.saved
        if name == LowerToInteger.name:
            shapes = PropagateShapes(self.saved.example)
            return run_passes(lowered_of(self.saved), [shapes]).graph_module, self.saved
        raise RecipeError(
            f"the result folder {self.folder} holds the quantized student and not {place}: name its model with --source"
        )

    def program(self) -> Program | SavedStudent:
        return self.saved


@dataclass(frozen=True)
class SourceGraphs:
    """A source's model, compiled by a recipe.

    Where the recipe absorbs BatchNorm, the teacher alone is folded, and shown. What is lowered is calibrated on the
    example input only.
    """

    source: Source
    recipe: Recipe

    @property
    def name(self) -> str:
        return self.source.name

    def at(self, place: str) -> tuple[fx.GraphModule, Program | SavedStudent]:
        name = STAGES.get(place, place)
        seen: dict[str, fx.GraphModule] = {}

        def keep(one: Pass, graph_module: fx.GraphModule) -> None:
            if one.name == name:
                seen[name] = deep_copy(graph_module)

        source = self.source
        program = build_program(
            source.model,
            source.example_inputs,
            self.recipe,
            example_kwargs=source.example_kwargs,
            after=keep,
        )
        if name == LowerToInteger.name:
            calibrate(program.student, [program.example], method=self.recipe.initialization)
            shapes = PropagateShapes(program.example)
            return run_passes(lower(program.student).graph_module, [shapes]).graph_module, program
        if name == FoldBatchNorm.name and name not in seen:
            return distillation_teacher(program), program
        if name not in seen:
            raise RecipeError(
                f"no pass {place} runs before calibration with this recipe: see its keys equalize, rounding and "
                "bias_correction"
            )
        return seen[name], program

    def program(self) -> Program | SavedStudent:
        source = self.source
        return build_program(
            source.model, source.example_inputs, self.recipe, example_kwargs=source.example_kwargs
        )
