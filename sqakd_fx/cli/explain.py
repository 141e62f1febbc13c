"""Why a node has, or has not, a quantizer: the rule, the recipe's line, the region, the bits, the ONNX form."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import fx, nn

from sqakd_fx.cli.file_names import layers_of_names
from sqakd_fx.diagnostics.terminal import say
from sqakd_fx.diagnostics.wording import did_you_mean, printable
from sqakd_fx.errors import RecipeError
from sqakd_fx.exporters.container import QUANTIZER_FORM, onnx_form
from sqakd_fx.ir import meta
from sqakd_fx.ir.op_names import op_name
from sqakd_fx.ir.op_table import Kind, Op, op_of, shape_of
from sqakd_fx.ir.rewriting import node_path, paths_and_parents
from sqakd_fx.program import Program
from sqakd_fx.quant.batch_norm import AbsorbedBatchNorm, AffineBatchNorm, RoundedBias
from sqakd_fx.quant.quantizer import Quantizer
from sqakd_fx.quant.runtime_sum import RuntimeSum
from sqakd_fx.results.student import SavedStudent

_ABSORBING: Mapping[type[nn.Module] | type[None], str] = {
    AbsorbedBatchNorm: "BatchNorm, live while training; lowering puts it into the weight scale and "
    "the int32 bias of the layer in front of it",
    AffineBatchNorm: "BatchNorm without a layer in front of it, or a learned shift and scale of each channel: an "
    "integer affine per channel",
    RoundedBias: "the bias, rounded to int32 in evaluation as it is exported",
}

_WORDS = {"placeholder": "input", "output": "output", "get_attr": "constant"}
_OWN: Mapping[type[nn.Module] | type[None], str] = {
    AbsorbedBatchNorm: "batch_norm, absorbed",
    AffineBatchNorm: "affine per channel",
    RoundedBias: "round bias",
}

Explanation = dict[str, str]
"""Label to text, in the order in which it is shown."""


def operation(node: fx.Node, module: nn.Module | None) -> str:
    """What a node does, in the words of the op table; `module` is what a call_module calls."""
    if node.op in _WORDS:
        return _WORDS[node.op]
    if isinstance(module, Quantizer):
        return "quantize weight" if module.role == "weight" else "quantize"
    known = _OWN.get(type(module)) or op_name(
        node, {} if module is None else {str(node.target): module}
    )
    return (known or str(getattr(node.target, "__name__", node.target))).removesuffix(".default")


def explain(
    program: Program | SavedStudent, name: str, file: Mapping[str, str] | None = None
) -> list[Explanation]:
    """What is known of the nodes called `name`, or of those of the module with this path or under it.

    `name` may be that of a node or a tensor in the exported file; `file` holds by such names what they belong to.

    Raises:
        RecipeError: there is none; suggests near names.
    """
    nodes = list(program.student.graph.nodes)
    of_file = [file[name]] if file is not None and name in file else []
    found = next(filter(None, (_called(one, nodes) for one in [*_meant(name), *of_file])), None)
    if found is None:
        names = sorted({n.name for n in nodes} | paths_and_parents(map(meta.module_path, nodes)))
        hint = did_you_mean(name, names, cutoff=0.4) or "`sqakd-fx inspect` lists them"
        raise RecipeError(f"--explain: there is no node or module {name!r}: {hint}")
    modules = dict(program.student.named_modules())
    reasons: dict[str, list[str]] = {}
    for note in program.notes:
        reasons.setdefault(note.node, []).append(note.reason)
    return [_explain(program.student, node, modules, reasons) for node in found]


def _called(name: str, nodes: Sequence[fx.Node]) -> list[fx.Node]:
    return (
        [n for n in nodes if name in (n.name, node_path(n))]
        or [n for n in nodes if meta.module_path(n) == name]
        or [n for n in nodes if n.op == "call_module" and n.target == name]
        or [n for n in nodes if meta.module_path(n).startswith(f"{name}.")]
    )


_IN_FILE = r"_quantized(_\d+)?$|\.(weight|weight_scale|bias|accumulator_scale|scale|zero_point)$"
"""What the file puts behind the name of a tensor or a layer."""


def _meant(name: str) -> list[str]:
    """`name`, and what it names where it is of the exported file: one/Conv, relu_quantized, one.weight_scale."""
    base = name.partition("/")[0].partition(":")[0]
    return [name, base, re.sub(_IN_FILE, "", base)]


def _explain(
    student: fx.GraphModule,
    node: fx.Node,
    modules: Mapping[str, nn.Module],
    reasons: Mapping[str, list[str]],
) -> Explanation:
    own = _quantizer(node, modules)
    facts = {"node": node.name, "module": meta.module_path(node), "shape": _shape(node)}
    if own is not None:
        facts |= _of_quantizer(student, node, own)
    else:
        facts |= _of_operation(student, node, modules)
        known = [*reasons.get(node.name, ()), *reasons.get(node_path(node), ())]
        facts["verdict"] = "; ".join(dict.fromkeys(known)) or _verdict(node, op_of(node, modules))
    return {label: text for label, text in facts.items() if text}


def _of_quantizer(student: fx.GraphModule, node: fx.Node, quantizer: Quantizer) -> Explanation:
    weight = quantizer.role == "weight"
    return {
        "operation": f"{operation(node, quantizer)} ({quantizer.extra_repr()})",
        "rule": "puts the weight of a layer on its grid"
        if weight
        else "stands behind the operation that makes a tensor, its BatchNorm and its clip",
        "quantizes": ", ".join(source.name for source in node.all_input_nodes),
        "read by": ", ".join(user.name for user in node.users),
        "shares its grid with": _region(student, node, str(node.target)),
        "in ONNX": "stored codes, read by DequantizeLinear" if weight else QUANTIZER_FORM,
    }


def _of_operation(
    student: fx.GraphModule, node: fx.Node, modules: Mapping[str, nn.Module]
) -> Explanation:
    op = op_of(node, modules)
    settings = meta.layer(node)
    facts = {
        "operation": operation(node, modules.get(str(node.target))) if op is None else op.name,
        "rule": _ABSORBING.get(type(modules.get(str(node.target))), "")
        if op is None
        else f"{op.name} {op.kind.value}",
        "recipe": "" if settings is None else settings.source,
        "bits": ""
        if settings is None
        else f"activation {settings.activation_bits}"
        if op is None or op.weight is None
        else f"weight {settings.weight_bits}, activation {settings.activation_bits}",
    }
    if isinstance(modules.get(str(node.target)), RuntimeSum):
        facts["in evaluation"] = "rounded as ONNX Runtime's integer kernel rounds it"
    for source in node.all_input_nodes:
        quantizer = _quantizer(_behind_moves(source, modules), modules)
        if quantizer is not None:
            shown = source if _quantizer(source, modules) is None else source.all_input_nodes[0]
            facts[f"input {shown.name}"] = quantizer.extra_repr()
    behind = next((user for user in node.users if _quantizer(user, modules) is not None), None)
    if behind is not None:
        quantizer = _quantizer(behind, modules)
        assert quantizer is not None
        facts["output"] = f"quantized by {behind.target} ({quantizer.extra_repr()})"
        facts["shares its grid with"] = _region(student, behind, str(behind.target))
    if op is not None and op.kind in (Kind.TRANSPARENT, Kind.JOINT):
        facts["in ONNX"] = "the same operator, on the codes where its input has them"
    elif op is not None and op.kind is not Kind.CLIP:
        facts["in ONNX"] = onnx_form(op, integer=meta.is_integer(node))
    return facts


def _behind_moves(node: fx.Node, modules: Mapping[str, nn.Module]) -> fx.Node:
    """The node that gives the values which a chain of reshapes and the like hands on."""
    while node.all_input_nodes and _is_move(op_of(node, modules)):
        node = node.all_input_nodes[0]
    return node


def _is_move(op: Op | None) -> bool:
    return op is not None and op.kind is Kind.TRANSPARENT


def _verdict(node: fx.Node, op: Op | None) -> str:
    if op is None:
        return ""
    if meta.is_integer(node):
        return "computed on integers"
    if op.kind is Kind.CLIP:
        return "merged into the code range of the quantizer behind it, where there is one"
    if op.kind in (Kind.TRANSPARENT, Kind.JOINT):
        return "moves integer codes where its input has them, floats where not"
    return "computed in float"


def _quantizer(node: fx.Node, modules: Mapping[str, nn.Module]) -> Quantizer | None:
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    return module if isinstance(module, Quantizer) else None


def _region(student: fx.GraphModule, node: fx.Node, quantizer: str) -> str:
    """The other tensors that the same quantizer puts on its grid."""
    calls = student.graph.find_nodes(op="call_module", target=quantizer)
    return ", ".join(call.all_input_nodes[0].name for call in calls if call is not node)


def _shape(node: fx.Node) -> str:
    return "×".join(map(str, shape_of(node) or ()))


def show_explanation(
    program: Program | SavedStudent, name: str, form: str, file: Path | None = None
) -> None:
    """Print why the nodes of a name have, or have not, a quantizer; `file` is the exported one, where there is one."""
    found = explain(program, name, None if file is None else layers_of_names(file))
    if form == "json":
        print(json.dumps(found, indent=2))
        return
    width = max(len(label) for facts in found for label in facts)
    for facts in found:
        for label, text in facts.items():
            say(f"{label:<{width}}  {printable(text)}")
        print()
