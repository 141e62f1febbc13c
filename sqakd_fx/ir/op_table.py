"""The op table: the one place that knows what a convolution is.

An operation has one row, whether the user reached it as a module, a function, a tensor method, a
Python operator or an aten overload: `op_name` reduces all five to the same name. Every pass asks
the table; none has a list of classes of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sqakd_fx.ir.op_names import op_name
from sqakd_fx.ir.paddings import pad_amounts, pad_value


class Kind(Enum):
    """What a quantizer insertion needs to know of an operation."""

    COMPUTE = "multiplies and accumulates: its inputs are quantized"
    SUM = "adds two tensors: its inputs are quantized"
    PRODUCT = "multiplies two tensors element by element: its inputs are quantized"
    AVERAGE = "averages values of one tensor: its input is quantized"
    CLIP = "is a monotone clip, merged into the grid of the quantizer behind it"
    TRANSPARENT = "moves or selects values: the output is on the input's grid"
    JOINT = "moves values of several tensors into one: they share one grid"
    SMOOTH = "is a nonlinear function, computed in float between quantized tensors"
    BATCH_NORM = "is an affine per channel in evaluation"
    NOISE = "is the identity in evaluation"
    SHAPE = "computes sizes, not values"


Nature = Literal[
    "classes", "probabilities", "independent probabilities", "embedding", "values", "scores"
]
"""What an output of a model is."""


@dataclass(frozen=True)
class Op:
    """One row of the table.

    Attributes:
        name: the canonical name, see `op_name`.
        kind: how quantization treats it.
        arguments: canonical argument names, in order (compute and clip rows only).
        defaults: their default values, from the last argument backwards.
        activations: positions of the arguments that are quantized as activations.
        weight: position of the weight argument, None where there is none.
        channel_axis: output channel axis of the weight.
        target: the function that the canonical form calls.
        axes: how many spatial axes a convolution or a pool has, None for what has no window.
        transposed: true for a transposed convolution.
        adaptive: true for a pool that is told the size of its output.
        takes_largest: true for a pool that takes the largest value of a window.
        on_bytes: false for what torch does not compute on uint8.
        commutes: false where the two inputs cannot change places.
        bounds: what a clip without arguments clips to.
        is_silu_gate: x times this of x is SiLU.
        gates_itself: true for what the integer program computes on codes as a gate and a product.
        gelu: the approximation of GELU that is half of x (1 + this of the number times x), and the number.
        integer: the operation of the integer program, in the namespace `torch.ops.sqakd_fx`.
        accumulator_axis: the channel axis of the int32 accumulator.
        fused: the kernel of ONNX Runtime that computes it on codes.
        pads: true for what writes zeros around a tensor.
        gives_parts: true for what gives a tuple of parts of one tensor.
        masks: true for what only replaces or casts scores on their way to a softmax.
        reads_scores: true for a softmax: its scores stay in float, and the runtime's kernel on codes is not used.
        looks_up: true for what takes rows of a stored table by their numbers.
        recurs: true for a recurrent layer over a whole sequence.
        normalizes_features: true for a normalization over the last axes.
        squares: true for what gives a tensor's square where it reads nothing else.
        divides: true for a quotient, whose first input alone is a factor.
        keeps_ratios: true for f, element by element, with f(s x) = s f(x) for every s > 0.
        interpolates: true for weighted means of neighbours over the axes behind the channels.
        concatenates: true for what places tensors beside one another.
        permutes: true for what only changes the order of the axes.
        indexes: true for what takes elements by an index, which may be a list or a tensor.
        weighed: position of the argument whose rows a matrix product adds up, None for other operations.
        gives: what it makes where it makes an output or a part of one: "classes", "probabilities" (of classes on an
            axis that their values tell), "independent probabilities" or "values".
        is_steep: true where the derivative at 0 is infinite.
        by_shape: the tensor method that does the same, given the shape of the output.
    """

    name: str
    kind: Kind
    arguments: tuple[str, ...] = ()
    defaults: tuple[Any, ...] = ()
    activations: tuple[int, ...] = (0,)
    weight: int | None = None
    channel_axis: int = 0
    target: Callable[..., Any] | None = None
    axes: int | None = None
    transposed: bool = False
    adaptive: bool = False
    takes_largest: bool = False
    on_bytes: bool = True
    commutes: bool = True
    bounds: tuple[float, float] | None = None
    gelu: tuple[str, float] | None = None
    is_silu_gate: bool = False
    gates_itself: bool = False
    integer: str | None = None
    accumulator_axis: int = 1
    fused: str | None = None
    pads: bool = False
    gives_parts: bool = False
    masks: bool = False
    reads_scores: bool = False
    looks_up: bool = False
    recurs: bool = False
    normalizes_features: bool = False
    squares: bool = False
    divides: bool = False
    keeps_ratios: bool = False
    interpolates: bool = False
    concatenates: bool = False
    permutes: bool = False
    indexes: bool = False
    weighed: int | None = None
    gives: Nature | None = None
    is_steep: bool = False
    by_shape: Callable[[Tensor, tuple[int, ...]], Tensor] | None = None

    @property
    def is_convolution(self) -> bool:
        return self.kind is Kind.COMPUTE and self.axes is not None

    @property
    def is_linear(self) -> bool:
        """Whether it multiplies rows of features by a stored matrix."""
        return self.kind is Kind.COMPUTE and self.weight is not None and self.axes is None

    @property
    def is_difference(self) -> bool:
        return self.kind is Kind.SUM and not self.commutes

    @property
    def is_mean(self) -> bool:
        """Whether it averages over axes that the call names."""
        return self.kind is Kind.AVERAGE and self.axes is None


_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_CONV_TRANSPOSE = (
    "input",
    "weight",
    "bias",
    "stride",
    "padding",
    "output_padding",
    "groups",
    "dilation",
)

_COMPUTE = [
    Op(
        f"conv{n}d",
        Kind.COMPUTE,
        _CONV,
        (None, 1, 0, 1, 1),
        weight=1,
        target=target,
        axes=n,
        integer="conv",
        fused="QLinearConv",
    )
    for n, target in ((1, F.conv1d), (2, F.conv2d), (3, F.conv3d))
]
_COMPUTE += [
    Op(
        f"conv_transpose{n}d",
        Kind.COMPUTE,
        _CONV_TRANSPOSE,
        (None, 1, 0, 0, 1, 1),
        weight=1,
        channel_axis=1,
        target=target,
        axes=n,
        transposed=True,
        integer="conv",
    )
    for n, target in ((1, F.conv_transpose1d), (2, F.conv_transpose2d), (3, F.conv_transpose3d))
]
_COMPUTE += [
    Op(
        "linear",
        Kind.COMPUTE,
        ("input", "weight", "bias"),
        (None,),
        weight=1,
        target=F.linear,
        integer="linear",
        accumulator_axis=-1,
        fused="QGemm",
    ),
    Op(
        "matmul",
        Kind.COMPUTE,
        ("input", "other"),
        activations=(0, 1),
        target=torch.matmul,
        integer="matmul",
        accumulator_axis=-1,
        fused="QLinearMatMul",
        weighed=1,
    ),
]

_PAIRS = [
    Op(name, kind, ("input", "other"), activations=(0, 1), target=target, integer=name, **columns)
    for name, kind, target, columns in (
        ("add", Kind.SUM, torch.add, {"fused": "QLinearAdd"}),
        ("sub", Kind.SUM, torch.sub, {"commutes": False}),
        ("mul", Kind.PRODUCT, torch.mul, {"fused": "QLinearMul", "squares": True}),
    )
]

_POOLS = [
    op
    for n in (1, 2, 3)
    for op in (
        Op(
            f"avg_pool{n}d",
            Kind.AVERAGE,
            axes=n,
            integer="average_pool",
            fused="QLinearAveragePool",
        ),
        Op(
            f"adaptive_avg_pool{n}d",
            Kind.AVERAGE,
            axes=n,
            adaptive=True,
            integer="average_pool",
            fused="QLinearGlobalAveragePool or QLinearAveragePool",
        ),
        Op(f"max_pool{n}d", Kind.TRANSPARENT, axes=n, takes_largest=True, on_bytes=n > 1),
    )
]
_POOLS += [
    Op(
        f"adaptive_max_pool{n}d",
        Kind.TRANSPARENT,
        axes=n,
        adaptive=True,
        takes_largest=True,
        on_bytes=False,
    )
    for n in (1, 2, 3)
]

_CLIPS = [
    Op(
        "relu",
        Kind.CLIP,
        ("input",),
        target=F.relu,
        bounds=(0.0, math.inf),
        keeps_ratios=True,
    ),
    Op("relu6", Kind.CLIP, ("input",), target=F.relu6, bounds=(0.0, 6.0)),
    Op("hardtanh", Kind.CLIP, ("input", "min_val", "max_val"), (-1.0, 1.0), target=F.hardtanh),
    Op("clamp", Kind.CLIP, ("input", "min", "max"), (None, None), target=torch.clamp),
]


def _rows(kind: Kind, names: str, **fields: Any) -> list[Op]:
    return [Op(name, kind, **fields) for name in names.split()]


TABLE: Mapping[str, Op] = {
    op.name: op
    for op in (
        *_COMPUTE,
        *_CLIPS,
        *_PAIRS,
        *_POOLS,
        Op("mean", Kind.AVERAGE, integer="global_average_pool", fused="QLinearGlobalAveragePool"),
        *_rows(
            Kind.TRANSPARENT,
            "squeeze unsqueeze repeat repeat_interleave contiguous clone detach identity narrow select "
            "slice roll flip pixel_shuffle pixel_unshuffle channel_shuffle tile gather "
            "index_select amax alias view_as reshape_as unfold float nearest_interpolate "
            "upsample_nearest1d upsample_nearest2d upsample_nearest3d",
        ),
        *_rows(Kind.TRANSPARENT, "flatten reshape view unflatten", by_shape=Tensor.reshape),
        *_rows(Kind.TRANSPARENT, "expand expand_as", by_shape=Tensor.expand),
        *_rows(Kind.TRANSPARENT, "permute transpose t movedim swapaxes numpy_T", permutes=True),
        Op("getitem", Kind.TRANSPARENT, indexes=True),
        *_rows(
            Kind.TRANSPARENT, "chunk split unbind split_with_sizes tensor_split", gives_parts=True
        ),
        Op("to", Kind.TRANSPARENT, masks=True),
        Op("zero_pad", Kind.TRANSPARENT, pads=True),
        *_rows(Kind.JOINT, "cat stack", concatenates=True),
        *_rows(Kind.JOINT, "maximum minimum"),
        *_rows(
            Kind.SMOOTH,
            "gelu elu selu celu mish local_response_norm log sin cos sum norm "
            "normalize einsum cumsum var std baddbmm pad softsign logsigmoid "
            "glu max_pool_with_indices cross_map_lrn2d im2col col2im sign reciprocal linalg_vector_norm "
            "vector_norm",
        ),
        *_rows(Kind.SMOOTH, "gru lstm rnn rnn_tanh rnn_relu", recurs=True),
        Op("sigmoid", Kind.SMOOTH, gives="independent probabilities", is_silu_gate=True),
        *_rows(Kind.SMOOTH, "hardswish silu", gates_itself=True),
        Op("hardsigmoid", Kind.SMOOTH, gives="independent probabilities"),
        *_rows(Kind.SMOOTH, "exp softplus group_norm instance_norm grid_sample", gives="values"),
        Op("tanh", Kind.SMOOTH, gives="values", gelu=("tanh", math.sqrt(2 / math.pi))),
        Op("erf", Kind.SMOOTH, gelu=("none", math.sqrt(1 / 2))),
        Op("log_softmax", Kind.SMOOTH, gives="classes"),
        *_rows(Kind.SMOOTH, "sqrt rsqrt", is_steep=True),
        *_rows(Kind.SMOOTH, "leaky_relu prelu neg abs", keeps_ratios=True),
        *_rows(Kind.SMOOTH, "layer_norm rms_norm", normalizes_features=True, gives="values"),
        Op("pow", Kind.SMOOTH, squares=True, is_steep=True),
        Op("square", Kind.SMOOTH, squares=True),
        *_rows(
            Kind.SMOOTH,
            "interpolate upsample upsample_bilinear2d upsample_bicubic2d upsample_linear1d "
            "upsample_trilinear3d",
            interpolates=True,
        ),
        Op("div", Kind.SMOOTH, divides=True),
        Op("embedding", Kind.SMOOTH, looks_up=True),
        Op("scaled_dot_product_attention", Kind.SMOOTH, weighed=2),
        Op("softmax", Kind.SMOOTH, gives="probabilities", reads_scores=True),
        *_rows(Kind.SMOOTH, "masked_fill where", masks=True),
        *_rows(
            Kind.NOISE, "dropout alpha_dropout feature_alpha_dropout stochastic_depth drop_path"
        ),
        Op("batch_norm", Kind.BATCH_NORM, gives="values"),
        *_rows(Kind.SHAPE, "size getattr dim numel shape len floordiv sym_size"),
    )
}

VIEWS = frozenset(
    name
    for names in (
        "flatten reshape view view_as reshape_as unflatten squeeze unsqueeze expand expand_as",
        "permute transpose t movedim swapaxes numpy_T getitem narrow select slice diagonal unfold",
        "chunk split split_with_sizes tensor_split unbind real imag",
        "contiguous detach alias identity to float",
    )
    for name in names.split()
)
"""Names of operations whose output may be the memory of their first input; some have no row."""

CASTS = frozenset(("to", "float", "type_as", "contiguous", "clone", "detach", "alias", "identity"))
"""Names of operations that give their first input's values in its order, in another type or memory."""

LAYS_OUT = frozenset(("contiguous",))
"""Names of operations that may change the order of a tensor's memory, and nothing else."""

RANDOM = ("rand", "dropout", "bernoulli", "normal", "multinomial")
"""What the names of operations that draw numbers begin with."""


def op_of(node: fx.Node, modules: Mapping[str, nn.Module]) -> Op | None:
    """The node's row, None where the table has none."""
    name = op_name(node, modules)
    if name in ("interpolate", "upsample") and _is_nearest(node, modules):
        name = "nearest_interpolate"
    elif name == "pad" and _pads_on_grid(node, modules):
        name = "zero_pad"
    elif name and name in TABLE and TABLE[name].takes_largest and _returns_indices(node, modules):
        name = "max_pool_with_indices"
    return TABLE.get(name) if name else None


def _pads_on_grid(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """True for a padding with zeros, or with -inf where only pools that take the largest value read it."""
    if pad_amounts(node) is None:
        return False
    return pad_value(node) == 0 or all(_takes_largest(user, modules) for user in node.users)


def is_read_by_max_pool(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """True for a padding, with zeros or -inf, in front of a pool that takes the largest value."""
    pads = op_name(node, modules) == "pad" and pad_amounts(node) is not None
    return pads and any(_takes_largest(user, modules) for user in node.users)


def _takes_largest(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    name = op_name(node, modules) or ""
    op = TABLE.get(name.removesuffix("_with_indices"))
    return op is not None and op.takes_largest


def convolution(axes: int, *, transposed: bool = False) -> Op:
    """The row of a convolution over so many spatial axes."""
    return TABLE[f"conv_transpose{axes}d" if transposed else f"conv{axes}d"]


def _returns_indices(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """True for a max pool that gives the places of its maxima beside them."""
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "return_indices", False))
    if isinstance(node.target, torch._ops.OpOverload):
        return len(node.target._schema.returns) > 1
    position = 2 if "adaptive" in str(op_name(node, modules)) else 6
    given = node.args[position] if len(node.args) > position else False
    return bool(node.kwargs.get("return_indices", given))


def _is_nearest(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """True for an interpolation that copies values."""
    if node.op == "call_module":
        return getattr(modules[str(node.target)], "mode", "nearest") == "nearest"
    mode = node.kwargs.get("mode", node.args[3] if len(node.args) > 3 else "nearest")
    return mode == "nearest"


def is_float32_tensor(node: fx.Node) -> bool:
    """True where shape propagation saw a float32 tensor at this node: QuantizeLinear takes no float64."""
    return getattr(node.meta.get("tensor_meta"), "dtype", None) is torch.float32


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """The shape that shape propagation saw, None for what is not a tensor."""
    meta = node.meta.get("tensor_meta")
    shape = getattr(meta, "shape", None)
    return None if shape is None else tuple(shape)


def node_macs(node: fx.Node) -> int:
    """Multiply-accumulates of a canonical convolution, linear layer or matrix product.

    Sizes are those that shape propagation saw; 0 where they are unknown.
    """
    ins, outs = shape_of(node.all_input_nodes[0]), shape_of(node)
    op = TABLE.get(getattr(node.target, "__name__", ""))
    if ins is None or outs is None or op is None or op.kind is not Kind.COMPUTE:
        return 0
    if op.weight is None:
        return math.prod(outs) * ins[-1]
    weight = shape_of(node.args[op.weight])  # type: ignore[arg-type]
    if weight is None:
        return 0
    if op.transposed:
        return math.prod(ins) * math.prod(weight[1:])
    return math.prod(outs) * math.prod(weight[1:])
