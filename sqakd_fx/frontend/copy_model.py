"""A copy of the user's model to work on: float32, in evaluation mode, with weights that are parameters."""

from __future__ import annotations

from collections.abc import Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._pytree import tree_map_only

from sqakd_fx.errors import TraceError, first_line
from sqakd_fx.frontend.readable import require_readable, require_values
from sqakd_fx.frontend.rebound import hold_to_copy
from sqakd_fx.frontend.verify import turned
from sqakd_fx.ir.copying import deep_copy
from sqakd_fx.ir.modes import evaluation_mode
from sqakd_fx.ir.outputs import largest_difference, tensors_of

_LARGEST_DIFFERENCE = 1e-2
"""Of a model and its copy, one of which may compute in half precision inside."""


def float_copy(model: nn.Module) -> nn.Module:
    """The copy. Weights that hooks compute (torch.nn.utils.weight_norm, spectral_norm) are computed now.

    Raises:
        TraceError: the model is not Python code with dense weights, or cannot be copied.
    """
    require_readable(model)
    require_values(model)
    copies: dict[int, Any] = {}
    try:
        copied = deep_copy(model, copies).eval()
    except Exception as error:
        raise TraceError(
            f"the model cannot be copied ({first_line(error)}): keep out of it what "
            "copy.deepcopy does not take, or give its class a __deepcopy__"
        ) from error
    hold_to_copy(copied, copies)
    for module in copied.modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, WeightNorm):
                remove_weight_norm(module, hook.name)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(module, hook.name)
    return copied.float()


def refuse_ties_to_the_original(
    model: nn.Module, copied: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Raise TraceError where a hook or a function of the model holds on to the model that was copied.

    Looked for on other values than the example's, and only where the model has such functions.
    """
    functions = [
        value
        for module in model.modules()
        for value in (
            *module._forward_hooks.values(),
            *module._forward_pre_hooks.values(),
            *vars(module).values(),
        )
        if isinstance(value, FunctionType)
    ]
    if not functions:
        return
    given = tree_map_only(Tensor, turned, (args, dict(kwargs)))
    try:
        with torch.no_grad(), evaluation_mode(model):
            args, kwargs = tree_map_only(Tensor, torch.clone, given)
            wanted = tensors_of(model(*args, **kwargs))
            if _is_half(model):  # in float32 it rounds otherwise
                copied = deep_copy(model)
                args, kwargs = tree_map_only(Tensor, torch.clone, given)
            else:
                args, kwargs = tree_map_only(Tensor, _as_float32, given)
            got = tensors_of(copied(*args, **kwargs))
            difference = largest_difference([x.float() for x in wanted], [x.float() for x in got])
            args, kwargs = tree_map_only(Tensor, torch.clone, given)
            again = tensors_of(model(*args, **kwargs))
            by_chance = largest_difference(wanted, again) > 0
    except Exception:
        return  # the model does not run on these values: tracing tells what stands in the way
    if not difference <= _LARGEST_DIFFERENCE and not by_chance:
        raise TraceError(
            "a copy of the model computes something else than the model, because a hook or a function that "
            "was put on it holds on to the model itself: let the hook use the module that it is called with"
        )


def _is_half(model: nn.Module) -> bool:
    tensors = (*model.parameters(), *model.buffers())
    return any(x.dtype in (torch.float16, torch.bfloat16) for x in tensors)


def _as_float32(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() else x
