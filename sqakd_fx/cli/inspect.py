"""`inspect`: graphs, quantizers, and what stays in float, for people and machines."""

from __future__ import annotations

import copy
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.tree import Tree
from torch import fx

from sqakd_fx.cli.arguments import check_choice
from sqakd_fx.cli.explain import operation
from sqakd_fx.errors import ExportError, RecipeError
from sqakd_fx.ir import meta
from sqakd_fx.ir.op_table import shape_of
from sqakd_fx.ir.pass_manager import Note, Pass, run_passes
from sqakd_fx.passes.fold_batch_norm import FoldBatchNorm
from sqakd_fx.passes.insert_quantizers import InsertQuantizers
from sqakd_fx.passes.lower_to_integer.lower import LowerToInteger
from sqakd_fx.passes.propagate_shapes import PropagateShapes
from sqakd_fx.passes.stable_top_k import StableTopK
from sqakd_fx.program import (
    Program,
    build_program,
    distillation_teacher,
    layer_facts,
    lower,
)
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.quant.quantizer import Quantizer
from sqakd_fx.recipe import Recipe
from sqakd_fx.source.source import Source

STAGES: Mapping[str, str] = {
    "traced": StableTopK.name,
    "folded": FoldBatchNorm.name,
    "quantized": InsertQuantizers.name,
    "lowered": LowerToInteger.name,
}
"""The pass behind which each stage is."""

_UNBOUNDED = 10_000
FORMATS = ("table", "tree", "code", "dot", "svg", "json")


def graph_at(source: Source, recipe: Recipe, place: str) -> tuple[fx.GraphModule, Program]:
    """The graph at a stage, or behind the last run of a pass.

    Where the recipe absorbs BatchNorm, the teacher alone is folded, and shown. What is lowered is calibrated on the
    example input only.
    """
    name = STAGES.get(place, place)
    seen: dict[str, fx.GraphModule] = {}

    def keep(one: Pass, graph_module: fx.GraphModule) -> None:
        if one.name == name:
            seen[name] = copy.deepcopy(graph_module)

    program = build_program(
        source.model,
        source.example_inputs,
        recipe,
        example_kwargs=source.example_kwargs,
        after=keep,
    )
    if name == LowerToInteger.name:
        calibrate(program.student, [program.example], method=recipe.initialization)
        shapes = PropagateShapes(program.example)
        return run_passes(lower(program.student).graph_module, [shapes]).graph_module, program
    if name == FoldBatchNorm.name and name not in seen:
        return distillation_teacher(program), program
    if name not in seen:
        raise RecipeError(
            f"no pass {place} runs before calibration with this recipe: see its keys equalize and bias_correction"
        )
    return seen[name], program


def rows(graph_module: fx.GraphModule) -> list[dict[str, Any]]:
    """One entry a node: name, operation, module path, shape, and its quantizer."""
    modules = dict(graph_module.named_modules())
    found = []
    for node in graph_module.graph.nodes:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        quantizer = module if isinstance(module, Quantizer) else None
        tag = meta.quantized_tensor(node)
        found.append(
            {
                "name": node.name,
                "op": node.op if quantizer is None else "quantizer",
                "operation": operation(node, module),
                "module": _module(node),
                "shape": list(shape_of(node) or ()),
                "bits": quantizer.bits if quantizer else tag and tag.bits,
                "family": quantizer.family.name if quantizer else tag and tag.family,
                "inputs": [source.name for source in node.all_input_nodes],
            }
        )
    return found


def _module(node: fx.Node) -> str:
    """The user's module that a node belongs to, at any stage."""
    tag = meta.quantized_tensor(node)
    owner = str(node.target).rpartition(".")[0] if node.op == "get_attr" else ""
    codes_of = tag.module if tag is not None else None
    return meta.module_path(node) or codes_of or meta.accumulator_source(node) or owner


def show_stage(source: Source, recipe: Recipe, place: str, form: str) -> None:
    """Print the graph at a stage, or behind a pass, in one of FORMATS."""
    graph_module, program = graph_at(source, recipe, place)
    if form == "code":
        print(_code(graph_module))
    elif form == "json":
        value = {
            "stage": place,
            "front_end": program.traced.front_end,
            "nodes": rows(graph_module),
            "layers": [asdict(fact) for fact in layer_facts(program.student)],
            "stays_in_float": [asdict(note) for note in program.notes],
        }
        print(json.dumps(value, indent=2))
    elif form == "dot":
        print(_dot(graph_module))
    elif form == "svg":
        print(_svg(_dot(graph_module)))
    elif form == "tree":
        _print_tree(source.name, graph_module)
    else:
        _print_table(graph_module, program.notes)


def _code(graph_module: fx.GraphModule) -> str:
    """The graph as Python, without the lines' ends that only set free what is no longer read."""
    return re.sub(r";  (\w+ = )+None$", "", graph_module.code.strip(), flags=re.MULTILINE)


def _console() -> Console:
    """As wide as the terminal; in a file or a pipe, as wide as what is written."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_UNBOUNDED)


def _print_table(graph_module: fx.GraphModule, notes: Sequence[Note]) -> None:
    console = _console()
    table = Table("node", "operation", "shape", "quantizer", "module")
    for row in rows(graph_module):
        grid = "" if row["bits"] is None else f"{row['bits']} bits {row['family']}"
        shape = "×".join(map(str, row["shape"]))
        table.add_row(row["name"], row["operation"], shape, grid, row["module"])
    console.print(table)
    console.print("stays in float, or was left alone:" if notes else "nothing stays in float")
    for note in notes:
        console.print(f"- {note.node}: {note.reason}", markup=False, soft_wrap=True)


def _print_tree(name: str, graph_module: fx.GraphModule) -> None:
    root = Tree(name)
    branches: dict[str, Tree] = {"": root}
    for row in rows(graph_module):
        path = ""
        for part in str(row["module"]).split("."):
            parent, path = path, f"{path}.{part}" if path else part
            if part and path not in branches:
                branches[path] = branches[parent].add(part)
        grid = "" if row["bits"] is None else f"  [{row['bits']} bits {row['family']}]"
        branches.get(path, root).add(f"{row['name']}: {row['operation']}{grid}".replace("[", "\\["))
    _console().print(root)


def _dot(graph_module: fx.GraphModule) -> str:
    lines = ["digraph student {", "  node [shape=box];"]
    for row in rows(graph_module):
        grid = "" if row["bits"] is None else f"\\n{row['bits']} bits {row['family']}"
        style = ' style=filled fillcolor="lightblue"' if grid else ""
        lines.append(
            f'  "{row["name"]}" [label="{row["name"]}\\n{row["operation"]}{grid}"{style}];'
        )
        lines += [f'  "{source}" -> "{row["name"]}";' for source in row["inputs"]]
    return "\n".join([*lines, "}"])


def _svg(dot: str) -> str:
    """Drawn by graphviz, through its Python package; raises RecipeError where either is absent."""
    try:
        import graphviz

        return str(graphviz.Source(dot).pipe(format="svg", encoding="utf-8"))
    except ImportError:
        raise RecipeError(
            "--format svg needs the Python package graphviz: pip install 'sqakd-fx[svg]', or use "
            "--format dot"
        ) from None
    except graphviz.backend.ExecutableNotFound:
        raise RecipeError(
            "--format svg needs graphviz's program `dot`: install graphviz, or use --format dot"
        ) from None


def show_difference(source: Source, recipe: Recipe, old: str, new: str) -> None:
    """A unified diff of the code at two stages, or behind two passes."""
    before, after = (_code(graph_at(source, recipe, place)[0]) for place in (old, new))
    for line in difflib.unified_diff(
        before.splitlines(), after.splitlines(), old, new, lineterm=""
    ):
        print(line)


def show_onnx(path: Path, form: str) -> None:
    """Operators of an ONNX file, and its quantized tensors."""
    import onnx

    check_choice("--format", form, ("table", "json"))
    if not path.is_file():
        raise ExportError(f"there is no file {path}: check the path")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise ExportError(f"{path} is not an ONNX model: check the file") from error
    annotated = {a.tensor_name for a in model.graph.quantization_annotation}
    nodes = [
        {
            "name": node.name,
            "operator": node.op_type,
            "outputs": list(node.output),
            "quantized": any(name in annotated for name in node.output),
        }
        for node in model.graph.node
    ]
    metadata = {p.key: p.value for p in model.metadata_props}
    if form == "json":
        print(json.dumps({"metadata": metadata, "nodes": nodes}, indent=2))
        return
    console = Console(highlight=False)
    table = Table("node", "operator", "quantized output")
    for node in nodes:
        table.add_row(str(node["name"]), str(node["operator"]), "yes" if node["quantized"] else "")
    console.print(table)
    for key, value in metadata.items():
        console.print(f"{key}: {value}", markup=False)
