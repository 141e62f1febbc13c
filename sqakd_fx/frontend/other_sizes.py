"""What stands in the way of axes whose sizes the recipe frees: a model, or a pool, of one size only."""

from __future__ import annotations

import torch
from torch import fx, nn

from sqakd_fx.diagnostics.source_lines import code_line, model_line
from sqakd_fx.errors import TraceError, first_line
from sqakd_fx.frontend.example_call import Call
from sqakd_fx.frontend.float32 import in_float32
from sqakd_fx.ir import meta
from sqakd_fx.ir.op_table import op_of, shape_of
from sqakd_fx.ir.other_sizes import at_other_sizes, shapes_in_words
from sqakd_fx.recipe.free_axes import names_of


def require_other_sizes(model: nn.Module, call: Call) -> None:
    """Raise TraceError where the model runs at none of the other sizes that are tried of its free axes."""
    tensors = call.tensors()
    tried = at_other_sizes(list(tensors.values()), call.free_axes)
    failed: list[tuple[str, Exception]] = []
    for other in tried:
        args, kwargs = call.with_tensors(dict(zip(tensors, other, strict=True)))
        try:
            with torch.no_grad(), in_float32():
                model(*args, **kwargs)
        except Exception as error:
            failed.append((shapes_in_words(other), error))
    if tried and len(failed) == len(tried):
        shapes, cause = failed[0]
        location = model_line(cause)
        raise TraceError(
            f"the recipe frees {names_of(call.free_axes)} (dynamic), and the model runs at the example's size only: at "
            f"{shapes} it fails{f' at {location}' if location else ''} ({first_line(cause)}); leave that out of "
            "dynamic, or pool to one size in front of what fails",
            location=location,
        ) from cause


def refuse_fixed_pools(graph_module: fx.GraphModule) -> None:
    """Raise TraceError where an adaptive pool makes a fixed size, not 1, of a free one: ONNX has no such form."""
    modules = dict(graph_module.named_modules())
    for node in graph_module.graph.nodes:
        op = op_of(node, modules)
        if op is None or not op.adaptive or not node.all_input_nodes:
            continue
        free = set(meta.free_axes(node.all_input_nodes[0])) - set(meta.free_axes(node))
        made = shape_of(node) or ()
        fixed = [size for axis, size in enumerate(made) if axis in free and size != 1]
        if fixed:
            location = code_line(node)
            raise TraceError(
                f"{node.name}{f' ({location})' if location else ''} pools to {fixed[0]} values whatever the size, for "
                "which ONNX has no form: pool to 1, or leave that axis out of dynamic",
                node=node.name,
                location=location,
            )
