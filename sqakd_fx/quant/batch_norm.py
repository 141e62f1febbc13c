"""BatchNorm as an affine per channel, and as it is absorbed into an integer layer.

In evaluation y = a x + b with a = γ / sqrt(var + ε), b = β - mean a. Behind an integer layer x is
`s_x s_w` times an integer accumulator, so y is `unit` times an integer plus b, unit = s_x s_w a.
The exported bias is the int32 nearest to b / unit. The training graph computes with that rounded
bias in evaluation, so that it is the function that is exported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sqakd_fx.diagnostics.batch_errors import batch_named, call, require_finite
from sqakd_fx.ir.batches import moved
from sqakd_fx.ir.op_names import op_name
from sqakd_fx.ir.op_table import TABLE, Kind, op_of
from sqakd_fx.ir.rewriting import constant_of, insert_attribute
from sqakd_fx.quant.levels import largest_weight_code
from sqakd_fx.quant.quantizer import Quantizer

_BIAS_LIMIT = 2.0**30
AFFINE_CODE = largest_weight_code("reduced", 8)
"""Of a lone multiplier, one weight code a channel: the largest that fits on every processor, for a fine bias."""
AFFINE_SCALE = torch.tensor(1.0 / AFFINE_CODE, dtype=torch.float32)


def is_batch_norm(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """True for a call of a BatchNorm module that has running statistics."""
    if node.op != "call_module":
        return False
    op = op_of(node, modules)
    module = modules[str(node.target)]
    return (
        op is not None
        and op.kind is Kind.BATCH_NORM
        and getattr(module, "running_mean", None) is not None
    )


class ChannelAffine(nn.Module):
    """y = a x + b with a and b of each channel, which are learned: no change at the start.

    In front of a quantizer of one bit it gives each channel its own threshold (RSign of ReActNet, Liu 2020).
    Called with a tensor (N, C, ...).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1,) + (1,) * (x.ndim - 2)
        return x * self.weight.reshape(shape) + self.bias.reshape(shape)


def affine_of(module: nn.Module) -> tuple[Tensor, Tensor]:
    """(a, b), each of shape (channels,), of a BatchNorm module in evaluation or of a `ChannelAffine`."""
    if isinstance(module, ChannelAffine):
        return module.weight, module.bias
    mean, variance = module.running_mean, module.running_var
    a = torch.rsqrt(variance + module.eps)  # type: ignore[operator, arg-type]
    if module.weight is not None:
        a = module.weight * a  # type: ignore[operator]
    b = -mean * a  # type: ignore[operator]
    return a, b if module.bias is None else module.bias + b  # type: ignore[operator]


def settled(norm: _BatchNorm, x: Tensor) -> Tensor:
    """What a BatchNorm module gives in evaluation."""
    y: Tensor = nn.functional.batch_norm(
        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps
    )
    return y


@torch.no_grad()
def track(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    """Take a batch's mean and unbiased variance, (channels,), into the running statistics, if there are any."""
    if norm.running_mean is None or norm.running_var is None:
        return
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    share = 1.0 / int(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean, share)
    norm.running_var.lerp_(variance, share)


def sole_compute_input(
    graph_module: fx.GraphModule, node: fx.Node, reads: Mapping[str, int]
) -> fx.Node | str:
    """The layer in front of a BatchNorm node, or why it cannot be merged with it; `reads` as `reads_of` counts."""
    layer = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(layer, fx.Node):
        return "its input is not a graph value"
    return sole_compute(graph_module, layer, reads)


def sole_compute(
    graph_module: fx.GraphModule, layer: fx.Node, reads: Mapping[str, int]
) -> fx.Node | str:
    """`layer` where what reads it can be merged with it, or why it cannot."""
    op = TABLE.get(op_name(layer, {}) or "") if layer.op == "call_function" else None
    if op is None or op.kind is not Kind.COMPUTE or op.weight is None:
        return f"{layer.name} in front of it is not a convolution or linear layer"
    if len(layer.users) > 1:
        return f"{layer.name} in front of it has {len(layer.users)} consumers"
    return why_not_rescaled(graph_module, layer, reads) or layer


def why_not_rescaled(
    graph_module: fx.GraphModule, layer: fx.Node, reads: Mapping[str, int]
) -> str | None:
    """Why other weights and another bias of a layer would not be its alone; None where they are."""
    weight, bias = layer.args[1:3]
    if constant_of(graph_module, weight) is None:
        return f"the weight of {layer.name} is computed, not a parameter"
    if reads[str(weight.target)] > 1:  # type: ignore[union-attr]
        return f"the weight of {layer.name} is used more than once"
    if bias is not None and constant_of(graph_module, bias) is None:
        return f"the bias of {layer.name} is computed, not a parameter"
    return None


def fold_into(
    graph_module: fx.GraphModule, layer: fx.Node, multiplier: Tensor, offset: Tensor
) -> None:
    """Give a layer new weights and a bias: it computes multiplier * layer + offset, both of shape (channels,)."""
    op = TABLE[layer.target.__name__]  # type: ignore[union-attr]
    weight = constant_of(graph_module, layer.args[1])
    bias = constant_of(graph_module, layer.args[2])
    assert weight is not None
    shape = [1] * weight.ndim
    groups = int(layer.args[6]) if op.channel_axis == 1 else 1  # type: ignore[arg-type]
    if groups > 1:
        parts = torch.unflatten(weight, 0, (groups, -1))
        folded: Tensor = (parts * multiplier.reshape(groups, 1, -1, *shape[2:])).flatten(0, 1)
    else:
        shape[op.channel_axis] = -1
        folded = weight * multiplier.reshape(shape)
    offset = offset if bias is None else offset + bias * multiplier
    stem = str(layer.args[1].target).removesuffix("_folded")  # type: ignore[union-attr]
    names = (f"{stem}_folded", f"{stem.removesuffix('weight')}bias_folded")
    new = [
        insert_attribute(graph_module, layer, name, nn.Parameter(value.detach()))
        for name, value in zip(names, (folded, offset), strict=True)
    ]
    layer.args = (layer.args[0], *new, *layer.args[3:])


class Absorbed(NamedTuple):
    """An affine in integer form: value = unit * (sign * accumulator + bias).

    All of shape (channels,); `unit` is x_scale * weight_scale in float32. `dead` marks channels whose
    multiplier is so small next to the offset that int32 cannot hold both: there the accumulator is
    dropped and the channel is constant.
    """

    weight_scale: Tensor
    unit: Tensor
    sign: Tensor
    bias: Tensor
    dead: Tensor


def absorb(a: Tensor, b: Tensor, x_scale: Tensor, weight_scale: Tensor) -> Absorbed:
    """Integer form of y = a x + b, where x = x_scale * weight_scale * accumulator."""
    scale = weight_scale * a.abs()
    floor = b.abs() / _BIAS_LIMIT / x_scale
    dead = (scale <= floor) | (scale <= 0)
    scale = torch.where(dead, torch.where(floor > 0, floor, weight_scale), scale)
    unit = x_scale * scale
    sign = torch.where(dead | (a > 0), 1.0, -1.0)
    return Absorbed(scale, unit, sign, torch.round(b / unit), dead)


class AbsorbedBatchNorm(nn.Module):
    """BatchNorm behind a quantized layer: live in training, the exported affine in evaluation.

    Called with the layer's output (N, C, ...), its float weight, and its bias where it has one.
    """

    def __init__(self, module: nn.Module, x: Quantizer, weight: Quantizer) -> None:
        super().__init__()
        self.batch_norm = module
        self.scales = (x, weight)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.training or not (self.scales[0].enabled and self.scales[1].enabled):
            return self.batch_norm(x)  # type: ignore[no-any-return]
        with torch.no_grad():
            x_quantizer, w_quantizer = self.scales
            a, b = affine_of(self.batch_norm)
            carried = torch.zeros_like(a) if bias is None else a * bias
            at = absorb(a, b + carried, x_quantizer.code_scale(), w_quantizer.code_scale(weight))
            shape = (1, -1) + (1,) * (x.ndim - 2)
            offset = at.bias * at.unit - carried
            offset = torch.where(at.dead, offset + carried, offset)
            return x * torch.where(at.dead, 0.0, a).reshape(shape) + offset.reshape(shape)


class AffineBatchNorm(nn.Module):
    """BatchNorm with no layer to absorb it, or a `ChannelAffine`: exported as a per-channel multiplication of codes.

    Called with a tensor (N, C, ...) on the grid of `x`. In evaluation its offset is on the int32 grid.
    """

    def __init__(self, module: nn.Module, x: Quantizer) -> None:
        super().__init__()
        self.batch_norm = module
        self.scales = (x,)

    def forward(self, x: Tensor) -> Tensor:
        if self.training or not self.scales[0].enabled:
            return self.batch_norm(x)  # type: ignore[no-any-return]
        with torch.no_grad():
            a, b = affine_of(self.batch_norm)
            at = absorb(a, b, self.scales[0].code_scale(), AFFINE_SCALE.to(a.device))
            shape = (1, -1) + (1,) * (x.ndim - 2)
            kept = torch.where(at.dead, 0.0, a)
            return x * kept.reshape(shape) + (at.bias * at.unit).reshape(shape)


class RoundedBias(nn.Module):
    """A bias on the int32 grid of its layer's accumulator; the gradient passes straight through.

    Called with the bias (channels,) and the layer's float weight.
    """

    def __init__(self, x: Quantizer, weight: Quantizer) -> None:
        super().__init__()
        self.scales = (x, weight)

    def forward(self, bias: Tensor, weight: Tensor) -> Tensor:
        x_quantizer, w_quantizer = self.scales
        if not (x_quantizer.enabled and w_quantizer.enabled):
            return bias
        with torch.no_grad():
            one = torch.ones_like(bias)
            at = absorb(one, bias, x_quantizer.code_scale(), w_quantizer.code_scale(weight))
            rounded = at.bias * at.unit
        return rounded + (bias - bias.detach())


@torch.no_grad()
def reestimate_batch_norm(
    student: fx.GraphModule, batches: Iterable[tuple[Tensor, ...]], device: torch.device
) -> None:
    """Take BatchNorm statistics again, as plain averages over `batches`.

    Raises:
        SourceError: a batch is not finite, or the model does not take it.
    """
    norms = [m for m in student.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    student.train()
    for index, inputs in enumerate(batches):
        require_finite(inputs, f"batch {index} of the data")
        with batch_named(f"batch {index} of the data", inputs):
            call(student, *moved(inputs, device))
    student.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
