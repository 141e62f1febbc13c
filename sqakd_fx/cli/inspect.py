"""`inspect`: graphs, quantizers, and what stays in float, for people and machines."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.tree import Tree
from torch import fx

from sqakd_fx.cli.arguments import check_choice
from sqakd_fx.cli.explain import operation
from sqakd_fx.cli.graphs import Graphs
from sqakd_fx.diagnostics.terminal import cells, console, say, wide_console
from sqakd_fx.diagnostics.wording import printable
from sqakd_fx.errors import ExportError, RecipeError
from sqakd_fx.ir import meta
from sqakd_fx.ir.op_table import shape_of
from sqakd_fx.ir.pass_manager import Note
from sqakd_fx.program import layer_facts
from sqakd_fx.quant.quantizer import Quantizer


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


def show_stage(graphs: Graphs, place: str, form: str) -> None:
    """Print the graph at a stage, or behind a pass, in one of FORMATS."""
    graph_module, program = graphs.at(place)
    if form == "code":
        say(_code(graph_module))
    elif form == "json":
        value = {
            "stage": place,
            "front_end": program.front_end,
            "nodes": rows(graph_module),
            "layers": [asdict(fact) for fact in layer_facts(program.student)],
            "stays_in_float": [asdict(note) for note in program.notes],
        }
        print(json.dumps(value, indent=2))
    elif form == "dot":
        say(_dot(graph_module))
    elif form == "svg":
        print(_svg(_dot(graph_module)))
    elif form == "tree":
        _print_tree(graphs.name, graph_module)
    else:
        _print_table(graph_module, program.notes)


def _code(graph_module: fx.GraphModule) -> str:
    """The graph as Python, without the lines' ends that only set free what is no longer read."""
    return re.sub(r";  (\w+ = )+None$", "", graph_module.code.strip(), flags=re.MULTILINE)


def _print_table(graph_module: fx.GraphModule, notes: Sequence[Note]) -> None:
    answer = wide_console()
    table = Table("node", "operation", "shape", "quantizer", "module")
    for row in rows(graph_module):
        grid = "" if row["bits"] is None else f"{row['bits']} bits {row['family']}"
        shape = "×".join(map(str, row["shape"]))
        table.add_row(*cells(row["name"], row["operation"], shape, grid, row["module"]))
    answer.print(table)
    answer.print("stays in float, or was left alone:" if notes else "nothing stays in float")
    for note in notes:
        answer.print(printable(f"- {note.node}: {note.reason}"), soft_wrap=True)


def _print_tree(name: str, graph_module: fx.GraphModule) -> None:
    root = Tree(printable(name))
    branches: dict[str, Tree] = {"": root}
    for row in rows(graph_module):
        path = ""
        for part in str(row["module"]).split("."):
            parent, path = path, f"{path}.{part}" if path else part
            if part and path not in branches:
                branches[path] = branches[parent].add(printable(part))
        grid = "" if row["bits"] is None else f"  [{row['bits']} bits {row['family']}]"
        branches.get(path, root).add(printable(f"{row['name']}: {row['operation']}{grid}"))
    wide_console().print(root)


def _quoted(text: str) -> str:
    return printable(text).replace("\\", "\\\\").replace('"', '\\"')


def _dot(graph_module: fx.GraphModule) -> str:
    lines = ["digraph student {", "  node [shape=box];"]
    for row in rows(graph_module):
        grid = "" if row["bits"] is None else f"\\n{row['bits']} bits {_quoted(row['family'])}"
        style = ' style=filled fillcolor="lightblue"' if grid else ""
        lines.append(
            f'  "{row["name"]}" [label="{row["name"]}\\n{_quoted(row["operation"])}{grid}"{style}];'
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


def show_difference(graphs: Graphs, old: str, new: str) -> None:
    """A unified diff of the code at two stages, or behind two passes."""
    before, after = (_code(graphs.at(place)[0]) for place in (old, new))
    for line in difflib.unified_diff(
        before.splitlines(), after.splitlines(), old, new, lineterm=""
    ):
        say(line)


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
    answer = console()
    table = Table("node", "operator", "quantized output")
    for node in nodes:
        table.add_row(*cells(node["name"], node["operator"], "yes" if node["quantized"] else ""))
    answer.print(table)
    for key, value in metadata.items():
        answer.print(printable(f"{key}: {value}"))
