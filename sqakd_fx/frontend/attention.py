"""torch's own multi-head attention in operations that can be traced and quantized."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_ATTENTION = nn.MultiheadAttention


class PlainAttention(nn.Module):
    """nn.MultiheadAttention as three linear layers, scaled dot-product attention and a fourth.

    Called as nn.MultiheadAttention is, on batched input; averaged weights are returned where asked. What the owner of
    an nn.MultiheadAttention may read of it is there too: nn.TransformerEncoder looks at ten of its attributes.
    """

    _qkv_same_embed_dim = (
        False  # so torch's fused path, which reads the weights itself, is not taken
    )

    def __init__(self, module: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads, self.head_dim = module.num_heads, module.head_dim
        self.embed_dim, self.kdim, self.vdim = module.embed_dim, module.kdim, module.vdim
        self.dropout = module.dropout
        self.scale = module.head_dim**-0.5
        self.batch_first = module.batch_first
        packed = module.in_proj_weight
        weights = (
            packed.chunk(3)
            if packed is not None
            else (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        )
        biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = (
            _linear(weight, bias) for weight, bias in zip(weights, biases, strict=True)
        )
        self.out_proj = module.out_proj
        self.bias_k, self.bias_v = module.bias_k, module.bias_v
        self.add_zero_attn = module.add_zero_attn
        for name, value in vars(module).items():  # what the user has put on it
            self.__dict__.setdefault(name, value)

    def __getattr__(self, name: str) -> Any:
        """Methods of nn.MultiheadAttention, such as merge_masks, on this module."""
        if name in self._modules or name in self._parameters or not hasattr(_ATTENTION, name):
            return super().__getattr__(name)
        return getattr(_ATTENTION, name).__get__(self)

    @property
    def in_proj_weight(self) -> Tensor:
        layers = (self.q_proj, self.k_proj, self.v_proj)
        weights: list[Tensor] = [layer.weight for layer in layers]
        return torch.cat(weights)

    @property
    def in_proj_bias(self) -> Tensor | None:
        layers = (self.q_proj, self.k_proj, self.v_proj)
        biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
        return torch.cat(biases) if biases else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        keys, values = self.k_proj(key), self.v_proj(value)
        if self.bias_k is not None and self.bias_v is not None:
            keys, values = _appended(keys, self.bias_k), _appended(values, self.bias_v)
        if self.add_zero_attn:
            keys, values = (F.pad(x, (0, 0, 0, 1)) for x in (keys, values))
        further = (self.bias_k is not None) + self.add_zero_attn
        attn_mask, key_padding_mask = (
            F.pad(mask, (0, further)) if mask is not None and further else mask
            for mask in (attn_mask, key_padding_mask)
        )
        q, k, v = (
            torch.unflatten(x, -1, (self.num_heads, -1)).transpose(1, 2)
            for x in (self.q_proj(query), keys, values)
        )
        scores = torch.matmul(q, k.transpose(-2, -1)) * self.scale
        if attn_mask is not None:
            per_head = attn_mask.ndim == 3
            mask = torch.unflatten(attn_mask, 0, (-1, self.num_heads)) if per_head else attn_mask
            scores = _masked(scores, mask)
        if key_padding_mask is not None:
            scores = _masked(scores, key_padding_mask[:, None, None, :])
        weights = F.softmax(scores, dim=-1)
        y = self.out_proj(torch.matmul(weights, v).transpose(1, 2).flatten(2))
        y = y if self.batch_first else y.transpose(0, 1)
        if not need_weights:
            return y, None
        return y, weights.mean(1) if average_attn_weights else weights


def _appended(x: Tensor, position: Tensor) -> Tensor:
    """One more position, (1, 1, features), behind a sequence of (batch, length, features)."""
    return torch.cat([x, position.expand(x.shape[0], 1, -1)], 1)


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    """A True in a Boolean mask forbids, as nn.MultiheadAttention defines it."""
    return scores.masked_fill(mask, float("-inf")) if mask.dtype == torch.bool else scores + mask


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device=weight.device)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def spell_out_attention(model: nn.Module) -> None:
    """Replace every nn.MultiheadAttention in place by the same function in plain operations."""
    plain: dict[nn.Module, PlainAttention] = {}
    for owner in list(model.modules()):
        for name, child in list(owner.named_children()):
            if type(child) is not nn.MultiheadAttention:
                continue
            if child not in plain:
                plain[child] = PlainAttention(child).train(child.training)
            setattr(owner, name, plain[child])


def zeroes_padding(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """True for a call of nn.TransformerEncoder that torch's fused path computes without its padded positions."""
    if not isinstance(module, nn.TransformerEncoder) or not module.use_nested_tensor:
        return False
    padding = args[2] if len(args) > 2 else kwargs.get("src_key_padding_mask")
    return padding is not None
