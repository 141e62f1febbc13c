"""The student and its teacher: from a float model to a graph with quantizers, and what is known of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from sqakd_fx.frontend.copy_model import float_copy, refuse_ties_to_the_original
from sqakd_fx.frontend.example_call import Example, arguments
from sqakd_fx.frontend.other_sizes import refuse_fixed_pools
from sqakd_fx.frontend.output_kinds import OutputKind, decide_outputs, with_outputs
from sqakd_fx.frontend.trace import FloatModule, Traced, trace
from sqakd_fx.ir import meta
from sqakd_fx.ir.copying import deep_copy
from sqakd_fx.ir.op_table import node_macs
from sqakd_fx.ir.other_sizes import at_other_sizes
from sqakd_fx.ir.pass_manager import Compiled, GraphObserver, LogEntry, Note, Pass, run_passes
from sqakd_fx.ir.rewriting import constant_of
from sqakd_fx.passes.canonicalize import Canonicalize
from sqakd_fx.passes.compensate_rounding import CompensateRounding
from sqakd_fx.passes.correct_bias import CorrectBias
from sqakd_fx.passes.cross_layer_equalization import CrossLayerEqualization
from sqakd_fx.passes.decompose.rules import Decompose
from sqakd_fx.passes.drop_key_bias import DropKeyBias
from sqakd_fx.passes.fold_batch_norm import FoldBatchNorm
from sqakd_fx.passes.fold_channel_constants import FoldChannelConstants
from sqakd_fx.passes.fold_constants import FoldConstants
from sqakd_fx.passes.fold_scalars import FoldScalars
from sqakd_fx.passes.functionalize import Functionalize
from sqakd_fx.passes.insert_quantizers import InsertQuantizers
from sqakd_fx.passes.lower_to_integer.lower import LowerToInteger
from sqakd_fx.passes.name_activations import NameActivations
from sqakd_fx.passes.propagate_shapes import PropagateShapes
from sqakd_fx.passes.smooth_activations import SmoothActivations
from sqakd_fx.passes.stable_top_k import StableTopK
from sqakd_fx.quant.input_statistics import input_statistics
from sqakd_fx.quant.quantizer import Quantizer, quantizers_of
from sqakd_fx.recipe.free_axes import FreeAxes
from sqakd_fx.recipe.keys import Recipe
from sqakd_fx.recipe.resolution import resolve_recipe


@dataclass(frozen=True)
class Program:
    """A student graph, the float teacher it started as, and how it was made.

    `teacher` and `student` take tensors by position; `example` are those of one call, and `inputs` gives those of
    another. The student's quantizers pass values through until it is calibrated. `outputs` says what each output is
    taken for; the recipe has the loss of each.
    """

    teacher: fx.GraphModule
    student: fx.GraphModule
    example: tuple[Tensor, ...]
    input_names: tuple[str, ...]
    traced: Traced
    log: tuple[LogEntry, ...]
    recipe: Recipe
    outputs: tuple[OutputKind, ...]

    def inputs(self, call: Example) -> tuple[Tensor, ...]:
        """The tensors of a call, given as the example was, in the order in which the graphs take them.

        Raises:
            TraceError: an input is missing, or the call does not fit the model's signature.
        """
        return self.traced.call.flatten(*arguments(call))

    @property
    def front_end(self) -> str:
        """What made the graph of the model."""
        return self.traced.front_end

    @property
    def free_axes(self) -> FreeAxes:
        """The axes of each input whose sizes the exported file leaves open, beside the batch."""
        return self.traced.call.free_axes

    @property
    def is_calibrated(self) -> bool:
        """Whether every quantizer has a range."""
        return all(quantizer.enabled for quantizer in quantizers_of(self.student).values())

    @property
    def notes(self) -> tuple[Note, ...]:
        """What stays in float or was left alone, and why."""
        return _notes_of(self.traced) + tuple(note for entry in self.log for note in entry.notes)


def _notes_of(traced: Traced) -> tuple[Note, ...]:
    batch = "has a fixed size: the model takes the example's batch size only"
    return (
        *(
            Note(i.path, f"stays in float as a whole: {i.reason}{_way_out(i)}")
            for i in traced.float_modules
        ),
        *(
            Note(line, "branches on data: the branch that the example takes is kept")
            for line in traced.decisions
        ),
        *(
            Note(
                one.location,
                f"asks for the value of the parameter {one.parameter!r}: training does not change what follows from it",
            )
            for one in traced.frozen
        ),
        *(
            Note(name, "is a cache, and no output of the file: each call computes every position")
            for name in traced.left_out
        ),
        *(
            Note(
                path,
                "computes padded positions, where torch's fused path gives zeros without gradients: mask them before "
                "they are pooled",
            )
            for path in traced.padded
        ),
        *((Note("batch", batch),) if traced.fixed_batch else ()),
    )


def _way_out(float_module: FloatModule) -> str:
    if float_module.location is None:
        return ""
    return (
        f" ({float_module.location}); specialize = [{float_module.path!r}] in the recipe would take the example's "
        "branch"
    )


def _unifying(example: tuple[Any, ...], others: tuple[tuple[Any, ...], ...] = ()) -> list[Pass]:
    """From the traced graph to one form of every operation; `others` are calls of other sizes."""
    first: list[Pass] = [PropagateShapes(example, others)] if others else []
    return [
        *first,
        Functionalize(),
        FoldConstants(),
        Decompose(),
        PropagateShapes(example, others),
        Canonicalize(),
        NameActivations(),
        PropagateShapes(example, others),
        FoldChannelConstants(),
        FoldScalars(),
        DropKeyBias(),
    ]


def _ordering() -> list[Pass]:
    """What may change the model's values where torch leaves them open; the teacher is taken behind it."""
    return [StableTopK()]


def _equalizing(recipe: Recipe) -> list[Pass]:
    """What gives channels like sizes before any data is seen; the student alone has them."""
    return [CrossLayerEqualization()] if recipe.equalize == "weights" else []


def _quantizing(recipe: Recipe) -> list[Pass]:
    folding: list[Pass] = [FoldBatchNorm()] if recipe.batch_norm == "fold" else []
    return [*folding, InsertQuantizers(recipe)]


def _lowering() -> list[Pass]:
    return [LowerToInteger()]


def all_passes() -> dict[str, type[Pass]]:
    """Every pass by its name, in the order in which a model first meets them."""
    recipe = Recipe.model_validate({"batch_norm": "fold"})
    sequence = [*_unifying(()), *_ordering(), CrossLayerEqualization(), SmoothActivations()]
    sequence += [*_quantizing(recipe), CompensateRounding(), CorrectBias(), *_lowering()]
    return {one.name: type(one) for one in sequence}


def build_program(
    model: nn.Module,
    example: Example,
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    after: GraphObserver | None = None,
) -> Program:
    """Trace a float model and insert quantizers (disabled) by the recipe.

    The model is copied: the caller's own is not changed. `example` is one call, as for `trace`; `recipe` is a preset
    ("w4a4"), a TOML file, a mapping or a Recipe. `after` is called behind every pass.

    Raises:
        TraceError: the model cannot become a graph.
        PassError: a rewrite cannot keep its promise on this graph.
        RecipeError: the recipe has an unknown key, a value out of range, or an override that matches nothing.
    """
    recipe = recipe if isinstance(recipe, Recipe) else resolve_recipe(recipe)
    traced = _traced_copy(model, example, example_kwargs or {}, recipe)
    tensors = traced.call.tensors()
    inputs = tuple(tensors.values())

    def probe(graph_module: Callable[..., Any]) -> Any:
        with torch.no_grad():
            return graph_module(*(x.clone() for x in inputs))  # it may change them

    first = run_passes(
        traced.graph_module,
        _unifying(inputs, tuple(at_other_sizes(inputs, traced.call.free_axes))),
        probe=probe,
        after=after,
    )
    refuse_fixed_pools(first.graph_module)
    settled = run_passes(first.graph_module, _ordering(), after=after)
    teacher = deep_copy(settled.graph_module).eval()
    outputs = decide_outputs(teacher, inputs, recipe)
    for graph in (teacher.graph, settled.graph_module.graph):
        parts = {one.index: one.parts for one in outputs if one.parts}
        meta.set_output_parts(graph.output_node(), parts)
    passes = [*_equalizing(recipe), *_quantizing(recipe)]
    second = run_passes(settled.graph_module, passes, probe=probe, after=after)
    return Program(
        teacher,
        second.graph_module.eval(),
        inputs,
        tuple(tensors),
        traced,
        first.log + settled.log + second.log,
        with_outputs(recipe, outputs),
        outputs,
    )


def with_recipe(program: Program, recipe: Recipe, *, after: GraphObserver | None = None) -> Program:
    """The program with a student of another recipe, made of the same float graph; it is not calibrated.

    `recipe` differs from the program's own in where quantizers stand and how they are made, not in the losses.
    """

    def probe(graph_module: Callable[..., Any]) -> Any:
        with torch.no_grad():
            return graph_module(*(x.clone() for x in program.example))

    passes = [*_equalizing(recipe), *_quantizing(recipe)]
    made = run_passes(deep_copy(program.teacher), passes, probe=probe, after=after)
    again = {one.name for one in passes}
    log = tuple(entry for entry in program.log if entry.name not in again) + made.log
    return replace(program, student=made.graph_module.eval(), recipe=recipe, log=log)


def with_labels(
    program: Program, labels: Any, recipe: Recipe, answers: Sequence[Tensor]
) -> Program:
    """The program with what `labels` of a batch say of its outputs.

    `recipe` is the one that it was built from, `answers` all tensors that the float model returns for the batch.
    """
    outputs = decide_outputs(program.teacher, program.example, recipe, labels, answers)
    return replace(program, outputs=outputs, recipe=with_outputs(recipe, outputs))


def _traced_copy(
    model: nn.Module, example: Example, example_kwargs: Mapping[str, Any], recipe: Recipe
) -> Traced:
    copied = float_copy(model)
    args, kwargs = arguments(example)
    kwargs |= example_kwargs
    refuse_ties_to_the_original(model, copied, args, kwargs)
    return trace(
        copied,
        args,
        example_kwargs=kwargs,
        front_end=recipe.frontend,
        float_modules=recipe.float_modules,
        specialize=recipe.specialize,
        dynamic=recipe.dynamic,
    )


def equalize_activations(program: Program, batches: Iterable[tuple[Any, ...]]) -> None:
    """Move the sizes of channels from activations into weights of the student, in place, before it is calibrated.

    The student is made of the float graph again, after `batches` have shown how large its channels are; `batches` lie
    where the student lies.

    Raises:
        SourceError: the model does not take a batch.
    """
    seen = input_statistics(program.student, batches)
    sizes = {name: one.largest for name, one in seen.items()}
    smooth = SmoothActivations(sizes, program.recipe.equalize_strength)
    passes = [smooth, *_quantizing(program.recipe)]
    made = run_passes(deep_copy(program.teacher), passes)
    program.student.load_state_dict(made.graph_module.state_dict())


def compensate_rounding(
    student: fx.GraphModule, moments: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """Round the weights of a calibrated student so that later ones make up for earlier ones, in place.

    `moments` holds by layer E[x xᵀ], float32 of shape (groups, K, K), of what a row of K weights multiplies.
    Returned are the weights before, by layer.
    """
    rounding = CompensateRounding(moments)
    run_passes(student, [rounding])
    return rounding.before


def correct_biases(
    student: fx.GraphModule, means: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> None:
    """Take what quantized weights add to the mean output out of the biases of a calibrated student, in place.

    `means` holds by layer E[x] of each input channel, `weights` the float weights of layers whose weights have changed.
    """
    run_passes(student, [CorrectBias(means, weights)])


def distillation_teacher(program: Program) -> fx.GraphModule:
    """The float model as training runs it: BatchNorm folded, a third of the time on a CPU."""
    return run_passes(deep_copy(program.teacher), [FoldBatchNorm()]).graph_module.eval()


def lower(student: fx.GraphModule, *, after: GraphObserver | None = None) -> Compiled:
    """The integer program of a trained student, on the CPU; the student is not changed.

    Raises:
        PassError: a quantizer was not calibrated.
    """
    return run_passes(deep_copy(student).cpu().eval(), _lowering(), after=after)


@dataclass(frozen=True)
class LayerFacts:
    """One quantized layer as `inspect` and the report show it."""

    name: str
    operation: str
    weight_bits: int | None
    activation_bits: int
    weight_family: str | None
    granularity: str | None
    parameters: int
    source: str

    @property
    def weight_bytes(self) -> float:
        """Bytes of the weight codes at their nominal bits."""
        return self.parameters * (self.weight_bits or 0) / 8


def layer_facts(student: fx.GraphModule) -> list[LayerFacts]:
    """Every quantized layer, in graph order."""
    modules = dict(student.named_modules())
    facts = []
    for node in student.graph.nodes:
        settings = meta.layer(node)
        if settings is None:
            continue
        weight = next(
            (
                a
                for a in node.args
                if isinstance(a, fx.Node)
                and a.op == "call_module"
                and isinstance(modules[str(a.target)], Quantizer)
                and modules[str(a.target)].role == "weight"
            ),
            None,
        )
        quantizer = modules[str(weight.target)] if weight is not None else None
        tensor = constant_of(student, weight.args[0]) if weight is not None else None
        inputs = meta.input_quantizers(node, Quantizer).values()
        facts.append(
            LayerFacts(
                name=meta.module_path(node) or node.name,
                operation=str(getattr(node.target, "__name__", node.target)),
                weight_bits=quantizer.bits if isinstance(quantizer, Quantizer) else None,
                activation_bits=max(q.bits for q in inputs),
                weight_family=quantizer.family.name if isinstance(quantizer, Quantizer) else None,
                granularity=settings.granularity if quantizer is not None else None,
                parameters=0 if tensor is None else tensor.numel(),
                source=settings.source,
            )
        )
    return facts


def multiply_accumulates(student: fx.GraphModule) -> int:
    """Multiply-accumulates of all quantized layers, on the shapes of the example."""
    return sum(node_macs(node) for node in student.graph.nodes if meta.layer(node) is not None)


def enable_quantizers(student: fx.GraphModule) -> None:
    """Mark all quantizers as calibrated, after loading a state dict."""
    for quantizer in quantizers_of(student).values():
        quantizer.enabled = True
