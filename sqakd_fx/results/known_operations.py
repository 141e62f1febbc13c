"""The operations that a saved graph may call: a closed list of names, found in torch's own modules and nowhere else.

A name out of a file is never imported and never looked up in a module that can read, write or run something: `torch`
itself is such a module, so its functions are reached through this list alone.
"""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import sqakd_fx.ir.integer_ops
import sqakd_fx.ir.top_k  # noqa: F401  (register torch.ops.sqakd_fx)
from sqakd_fx.frontend.proxies import with_item
from sqakd_fx.ir.op_table import TABLE


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


ATTRIBUTES = _words("shape dtype device ndim T mT H mH real imag values indices data layout")
"""What a graph may read of a tensor by `getattr`."""

_MORE = _words("""
abs absolute acos acosh add addbmm addcdiv addcmul addmm addmv all allclose amax amin aminmax and_ angle any arange
arccos arcsin arctan argmax argmin argsort asin asinh atan atan2 atanh atleast_1d atleast_2d atleast_3d
baddbmm bartlett_window bilinear bitwise_and bitwise_not bitwise_or bitwise_xor blackman_window block_diag bmm bool
broadcast_tensors broadcast_to bucketize cartesian_prod cat cdist ceil celu chain_matmul chunk clamp clamp_max
clamp_min clone column_stack complex concat conj constant_pad_nd contiguous copysign cos cosh cosine_similarity
count_nonzero cpu cross cummax cummin cumprod cumsum deg2rad detach diag diag_embed diagflat diagonal diff dist
div divide dot double dsplit dstack einsum empty empty_like eq erf erfc erfinv exp exp2 expand expand_as expm1
eye fft fft2 fftfreq fftn fftshift fill flatten flip fliplr flipud float float_power floor floor_divide floordiv
fmax fmin fmod fold frac full full_like gather ge geqrf glu gt hamming_window hann_window heaviside hfft histc
hsplit hstack hypot iadd iand ifft ifft2 ifftn ifftshift ifloordiv igamma ihfft ilshift imatmul imul index_add
index_copy index_fill index_put index_select inner instance_norm int inv invert ior ipow irfft irfft2 irfftn
irshift isclose isfinite isinf isnan isneginf isposinf isub itruediv ixor kaiser_window kron kthvalue layer_norm
ldexp le len lerp lgamma linalg_vector_norm linear linspace log log10 log1p log2 logaddexp logaddexp2 logcumsumexp
logdet logical_and logical_not logical_or logical_xor logit logspace logsumexp long lshift lt masked_fill
masked_scatter masked_select matmul matrix_exp matrix_norm matrix_power max maximum mean median meshgrid min
minimum mm mod mode moveaxis movedim mul multiply mv nan_to_num nanmean nansum narrow ne neg negative new_empty
new_full new_ones new_zeros nextafter nonzero norm normalize not_ not_equal one_hot ones ones_like or_ outer
pairwise_distance pdist permute pinverse pixel_shuffle polar pos positive pow prod qr quantile rad2deg ravel
reciprocal relu remainder repeat repeat_interleave reshape rfft rfft2 rfftfreq rfftn rms_norm roll rot90 round rrelu
rshift rsqrt rsub scalar_tensor scatter scatter_add scatter_reduce searchsorted select select_scatter sgn short
sigmoid sign signbit sin sinc sinh size slice slice_scatter softmax softmin softplus softshrink softsign sort split
sqrt square squeeze stack std std_mean stft istft sub subtract sum sum_to_size svd swapaxes swapdims t take
take_along_dim tan tanh tanhshrink tensor_split tensordot threshold tile to topk trace transpose triangular_solve
tril tril_indices triu triu_indices true_divide truediv trunc type_as unbind unflatten unfold unique unsqueeze
vander var var_mean vdot vector_norm view view_as view_as_complex view_as_real vsplit vstack where xlogy xor zeros
zeros_like adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d affine_grid grid_sample hardshrink hardswish
hardtanh leaky_relu log_softmax lp_pool1d lp_pool2d max_unpool1d max_unpool2d channel_shuffle gumbel_softmax batch_norm
group_norm embedding_bag native_layer_norm native_group_norm native_batch_norm scaled_dot_product_attention lstm gru
sym_size sym_numel sym_stride numel dim half bfloat16 char byte erfcx entr expit log_ndtr ndtr ndtri multi_dot det
slogdet solve cholesky eigh inverse bmm convolution mkldnn_reshape copy lift_fresh_copy lift_fresh alias
upsample_nearest1d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d reflection_pad1d reflection_pad2d
replication_pad1d replication_pad2d replication_pad3d reflection_pad3d unsafe_split unsafe_chunk
_assert_tensor_metadata _to_copy _unsafe_view _softmax _log_softmax _native_batch_norm_legit_no_training
_native_batch_norm_legit _reshape_alias _conj _adaptive_avg_pool2d _adaptive_avg_pool3d _unsafe_index _cdist_forward
_scaled_dot_product_flash_attention_for_cpu _safe_softmax _trilinear _euclidean_dist _shape_as_tensor
isqrt comb gcd getitem concatenate
""")

NAMES = frozenset(TABLE) - {"getattr"} | _MORE
"""Base names; a function or method that changes its tensor in place has an underscore behind its own."""

_HOMES: Mapping[str, Any] = {
    "torch": torch,
    "functional": F,
    "operator": operator,
    "tensor": Tensor,
    "math": math,
    "linalg": torch.linalg,
    "fft": torch.fft,
    "special": torch.special,
    "builtins": builtins,
}
_OWN: Mapping[str, Callable[..., Any]] = {"getattr": getattr, "with_item": with_item}


def is_known(name: str) -> bool:
    """Whether `name` is an operation on tensors and numbers, changing its tensor in place or not."""
    return name in NAMES or (name.endswith("_") and name[:-1] in NAMES)


def _by_name() -> dict[str, Callable[..., Any]]:
    spelled = [spelling for name in sorted(NAMES) for spelling in (name, f"{name}_")]
    found = dict(_OWN)
    for home, module in _HOMES.items():
        for name in spelled:
            value = getattr(module, name, None)
            if callable(value):
                found[f"{home}.{name}"] = value
    return found


_FUNCTIONS = _by_name()
_NAMES_OF = {id(function): name for name, function in reversed(_FUNCTIONS.items())}


def name_of(target: Any) -> str | None:
    """The name by which `function_of` finds a function again; None for what is not known."""
    if isinstance(target, torch._ops.OpOverload):
        namespace, _, name = target._schema.name.partition("::")
        overload = target._overloadname
        found = f"ops.{namespace}.{name}.{overload}"
        return found if _overload(namespace, name, overload) is target else None
    return _NAMES_OF.get(id(target))


def function_of(name: str) -> Callable[..., Any] | None:
    """The function called `name`, None where it is none of the known ones."""
    parts = name.split(".")
    if parts[0] == "ops" and len(parts) == 4:
        return _overload(*parts[1:])
    return _FUNCTIONS.get(name)


def _overload(namespace: str, name: str, overload: str) -> Callable[..., Any] | None:
    """An operator of ATen that is known, or one of this package's own."""
    if not (namespace == "sqakd_fx" or (namespace == "aten" and is_known(name))):
        return None
    packet = getattr(getattr(torch.ops, namespace), name, None)
    found = getattr(packet, overload, None)
    return found if isinstance(found, torch._ops.OpOverload) else None
