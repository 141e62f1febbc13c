"""`inspect` and `doctor`: graphs, quantizers, and what stays in float, for people and machines."""

from __future__ import annotations

import difflib
import json
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.tree import Tree
from torch import fx

from sqakd_fx.cli.explain import explain, operation
from sqakd_fx.errors import ExportError, RecipeError, StorageError
from sqakd_fx.ir.op_table import shape_of
from sqakd_fx.ir.pass_manager import Note, run_passes
from sqakd_fx.ir.rewriting import module_path
from sqakd_fx.passes.fold_batch_norm import FoldBatchNorm
from sqakd_fx.passes.propagate_shapes import PropagateShapes
from sqakd_fx.program import Program, build_program, layer_facts, lower
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.quant.quantizer import Quantizer
from sqakd_fx.recipe import Recipe
from sqakd_fx.source.source import Source
from sqakd_fx.storage import is_result_folder

STAGES = ("traced", "folded", "quantized", "lowered")
_UNBOUNDED = 10_000
FORMATS = ("table", "tree", "code", "dot", "svg", "json")


def check_choice(option: str, value: str, choices: Sequence[str]) -> None:
    """Raise RecipeError where `value` is none of `choices`."""
    if value not in choices:
        near = difflib.get_close_matches(value, choices, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"choose {', '.join(choices)}"
        raise RecipeError(f"{option} {value!r} is unknown: {hint}")


def result_of(target: Path) -> tuple[Path, Path]:
    """(result folder, ONNX file) of a folder or of a file in one."""
    folder = target.parent if target.suffix == ".onnx" else target
    path = target if target.suffix == ".onnx" else target / "model.onnx"
    if not is_result_folder(folder):
        raise StorageError(
            f"{folder} is not a result folder: give one that `sqakd-fx quantize` made"
        )
    if not path.is_file():
        raise StorageError(f"there is no {path}: run `sqakd-fx export` on the folder first")
    return folder, path


def graph_at(source: Source, recipe: Recipe, stage: str) -> tuple[fx.GraphModule, Program]:
    """The graph of a stage; "lowered" is calibrated on the example input only."""
    program = build_program(
        source.model, source.example_inputs, recipe, example_kwargs=source.example_kwargs
    )
    if stage == "traced":
        return program.teacher, program
    if stage == "folded":
        return run_passes(program.teacher.eval(), [FoldBatchNorm()]).graph_module, program
    if stage == "quantized":
        return program.student, program
    calibrate(program.student, [program.example], method=recipe.initialization)
    shapes = PropagateShapes(program.example)
    return run_passes(lower(program.student).graph_module, [shapes]).graph_module, program


def rows(graph_module: fx.GraphModule) -> list[dict[str, Any]]:
    """One entry a node: name, operation, module path, shape, and its quantizer."""
    modules = dict(graph_module.named_modules())
    found = []
    for node in graph_module.graph.nodes:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        quantizer = module if isinstance(module, Quantizer) else None
        tag = node.meta.get("quantized_tensor") or {}
        found.append(
            {
                "name": node.name,
                "op": node.op if quantizer is None else "quantizer",
                "operation": operation(node, module),
                "module": _module(node),
                "shape": list(shape_of(node) or ()),
                "bits": quantizer.bits if quantizer else tag.get("bits"),
                "family": quantizer.family.name if quantizer else tag.get("family"),
                "inputs": [source.name for source in node.all_input_nodes],
            }
        )
    return found


def _module(node: fx.Node) -> str:
    """The user's module that a node belongs to, at any stage."""
    tag = node.meta.get("quantized_tensor") or {}
    owner = str(node.target).rpartition(".")[0] if node.op == "get_attr" else ""
    return module_path(node) or str(tag.get("module") or node.meta.get("source") or owner)


def show_stage(source: Source, recipe: Recipe, stage: str, form: str) -> None:
    """Print a stage in one of FORMATS."""
    graph_module, program = graph_at(source, recipe, stage)
    if form == "code":
        print(_code(graph_module))
    elif form == "json":
        value = {
            "stage": stage,
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


def show_explanation(source: Source, recipe: Recipe, name: str, form: str) -> None:
    """Print why the nodes of a name have, or have not, a quantizer."""
    _, program = graph_at(source, recipe, "quantized")
    found = explain(program, name)
    if form == "json":
        print(json.dumps(found, indent=2))
        return
    width = max(len(label) for facts in found for label in facts)
    for facts in found:
        for label, text in facts.items():
            print(f"{label:<{width}}  {text}")
        print()


def show_difference(source: Source, recipe: Recipe, old: str, new: str) -> None:
    """A unified diff of two stages' code."""
    before, after = (_code(graph_at(source, recipe, stage)[0]) for stage in (old, new))
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


def show_doctor() -> None:
    """Print what is installed and what each missing thing costs."""
    from sqakd_fx.engine.compilation import has_compiler
    from sqakd_fx.runtime.session import overflows

    console = Console(highlight=False)
    table = Table("what", "found", "if it is missing")
    table.add_row("Python", platform.python_version(), "")
    for name in ("sqakd-fx", "torch", "onnx", "onnxscript", "onnx-ir"):
        table.add_row(name, _version(name), "nothing works")
    runtime = next(
        (n for n in ("onnxruntime-gpu", "onnxruntime") if _version(n) != "–"), "onnxruntime"
    )
    table.add_row(runtime, _version(runtime), "no validation")
    cuda = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "–"
    table.add_row("GPU", cuda, "training runs on the CPU, 10 to 100 times slower")
    import onnxruntime

    found = ", ".join(
        p.removesuffix("ExecutionProvider") for p in onnxruntime.get_available_providers()
    )
    table.add_row("ONNX Runtime providers", found, "without CUDA, validation runs on the CPU")
    dot_products = "–" if overflows() else "yes"
    need = 'files of weight_range = "full" are wrong here; those of the default are not'
    table.add_row("8-bit dot products in ONNX Runtime", dot_products, need)
    compiler = "yes" if has_compiler(torch.device("cpu")) else "–"
    table.add_row("C++ compiler", compiler, "training runs uncompiled, about half as fast")
    console.print(table)


def show_capabilities() -> None:
    """Print what each provider of the installed ONNX Runtime does with each form of an operation."""
    import onnxruntime

    from sqakd_fx.runtime.capabilities import starts, table

    available = onnxruntime.get_available_providers()
    columns = {provider: table(provider) for provider in available if starts(provider)}
    console = Console(highlight=False)
    shown = Table("form", *(provider.removesuffix("ExecutionProvider") for provider in columns))
    for form in next(iter(columns.values()), {}):
        shown.add_row(form, *(answers[form].value for answers in columns.values()))
    console.print(f"ONNX Runtime {onnxruntime.__version__}")
    console.print(shown)
    for provider in available:
        if provider not in columns:
            console.print(f"{provider} does not start here")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "–"
