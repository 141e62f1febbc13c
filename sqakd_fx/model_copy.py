"""A copy of the user's model to work on: float32, in evaluation mode, with weights that are parameters."""

from __future__ import annotations

import copy

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from sqakd_fx.errors import TraceError, first_line


def float_copy(model: nn.Module) -> nn.Module:
    """The copy. Weights that hooks compute (torch.nn.utils.weight_norm, spectral_norm) are computed now.

    Raises:
        TraceError: the model has lazy layers without weights, or cannot be copied.
    """
    lazy = [name for name, tensor in model.named_parameters() if is_lazy(tensor)]
    lazy += [name for name, tensor in model.named_buffers() if is_lazy(tensor)]
    if lazy:
        raise TraceError(
            f"{lazy[0]} has no values yet, as its layer is lazy: call the model once on an example "
            "in model()"
        )
    computed: dict[int, Tensor] = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    try:
        copied = copy.deepcopy(model, computed).eval()
    except Exception as error:
        raise TraceError(
            f"the model cannot be copied ({first_line(error)}): keep out of it what "
            "copy.deepcopy does not take, such as open files, locks and tensors with a gradient history"
        ) from error
    for module in copied.modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, WeightNorm):
                remove_weight_norm(module, hook.name)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(module, hook.name)
    return copied.float()
