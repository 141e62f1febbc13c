"""Modules of a student as JSON: quantizers, what stands beside them, and leaf modules of torch.nn.

A module of torch.nn is its class by name and its plain attributes; its tensors lie in the file of tensors, and every
module is built without memory of its own until they come.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from sqakd_fx.errors import UnknownFamilyError
from sqakd_fx.ir.op_names import module_op_name
from sqakd_fx.ir.op_table import TABLE
from sqakd_fx.quant.batch_norm import AbsorbedBatchNorm, AffineBatchNorm, ChannelAffine, RoundedBias
from sqakd_fx.quant.families import FAMILIES
from sqakd_fx.quant.gated import HardSwishByCodes, SiluByCodes
from sqakd_fx.quant.quantizer import Quantizer
from sqakd_fx.quant.runtime_sum import RuntimeSum
from sqakd_fx.results.saved_values import NotSaved, decode, encode

Spec = dict[str, Any]
_QUANTIZER = (
    "role", "bits", "channels", "axis", "zero_in_grid", "largest_code", "paired", "signed", "power_of_two", "enabled",
)  # fmt: skip
_RNN = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "bidirectional")


def encode_module(module: nn.Module, paths: Mapping[int, str]) -> Spec:
    """JSON for a module; `paths` has the path of each quantizer by its identity.

    Raises:
        NotSaved: the module is code of the user's own.
    """
    if isinstance(module, Quantizer):
        settings = {name: getattr(module, name) for name in _QUANTIZER}
        return {"kind": "quantizer", "family": module.family.name, **settings}
    if isinstance(module, RoundedBias):
        return {"kind": "rounded bias", "quantizers": _paths(module.scales, paths)}
    if isinstance(module, RuntimeSum):
        return {"kind": "sum", "quantizers": _paths(module.grids, paths)}
    if isinstance(module, HardSwishByCodes):
        return {"kind": "hard-swish", "quantizers": _paths(module.grids, paths)}
    if isinstance(module, SiluByCodes):
        return {"kind": "silu", "quantizers": _paths(module.grids, paths)}
    if isinstance(module, AbsorbedBatchNorm | AffineBatchNorm):
        return {
            "kind": "absorbed" if isinstance(module, AbsorbedBatchNorm) else "affine",
            "quantizers": _paths(module.scales, paths),
            "batch_norm": encode_module(module.batch_norm, paths),
        }
    if isinstance(module, ChannelAffine):
        return {"kind": "channels", "channels": len(module.weight)}
    return _encode_layer(module)


def _paths(quantizers: tuple[Quantizer, ...], paths: Mapping[int, str]) -> list[str]:
    return [paths[id(quantizer)] for quantizer in quantizers]


def _encode_layer(module: nn.Module) -> Spec:
    name = type(module).__name__
    hooked = module._forward_hooks or module._forward_pre_hooks
    if _layer_class(name) is not type(module) or module._modules or hooked:
        raise NotSaved(f"holds the module {name}, which is Python code of its own")
    absent = [
        k for table in (module._parameters, module._buffers) for k, v in table.items() if v is None
    ]
    attributes: dict[str, Any] = dict.fromkeys(absent)
    for key, value in vars(module).items():
        if _is_attribute(type(module), key):
            try:
                attributes[key] = encode(value)
            except NotSaved:
                continue
    return {"kind": "layer", "class": name, "attributes": attributes}


def _is_attribute(kind: type[nn.Module], key: Any) -> bool:
    plain = isinstance(key, str) and key.isidentifier() and not key.startswith("_")
    return plain and key != "training" and not callable(getattr(kind, key, None))


def _layer_class(name: Any) -> type[nn.Module] | None:
    """A class of torch.nn that the op table knows."""
    kind = getattr(nn, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        return None
    known = kind.__module__.startswith("torch.nn.") and module_op_name(kind.__new__(kind)) in TABLE
    return kind if known else None


def decode_module(spec: Spec, quantizers: Mapping[str, nn.Module]) -> nn.Module:
    """The module of a spec, its tensors on the meta device.

    Raises:
        UnknownFamilyError: nobody has registered the family of a quantizer. ValueError, KeyError: the spec is damaged.
    """
    kind = spec["kind"]
    if kind not in _DECODERS:
        raise ValueError(f"there is no kind of module {kind!r}")
    with torch.device("meta"):
        return _DECODERS[kind](spec, quantizers)


def _quantizer(spec: Spec, quantizers: Mapping[str, nn.Module]) -> nn.Module:
    family = spec["family"]
    if family not in FAMILIES:
        raise UnknownFamilyError(
            f"uses the quantizer family {family!r}, which this package has not"
        )
    known = {"paired": False, **spec}
    settings: Spec = {name: known[name] for name in _QUANTIZER if name != "enabled"}
    made = Quantizer(family, settings.pop("role"), settings.pop("bits"), **settings)
    made.enabled = bool(spec["enabled"])
    return made


def _read(spec: Spec, quantizers: Mapping[str, nn.Module], count: int) -> list[Quantizer]:
    found = [quantizers[path] for path in spec["quantizers"]]
    if len(found) != count:
        raise ValueError(f"a {spec['kind']} reads {count} quantizers, not {len(found)}")
    return [one for one in found if isinstance(one, Quantizer)]


def _absorbed(spec: Spec, quantizers: Mapping[str, nn.Module]) -> nn.Module:
    inner = decode_module(spec["batch_norm"], quantizers)
    return AbsorbedBatchNorm(inner, *_read(spec, quantizers, 2))


def _affine(spec: Spec, quantizers: Mapping[str, nn.Module]) -> nn.Module:
    inner = decode_module(spec["batch_norm"], quantizers)
    return AffineBatchNorm(inner, *_read(spec, quantizers, 1))


def _layer(spec: Spec, quantizers: Mapping[str, nn.Module]) -> nn.Module:
    kind = _layer_class(spec["class"])
    if kind is None:
        raise ValueError(f"{spec['class']!r} is no layer of torch.nn that is known here")
    attributes = {key: decode(value, {}) for key, value in spec["attributes"].items()}
    if issubclass(kind, nn.RNNBase):
        return _recurrent(kind, attributes)
    made = kind.__new__(kind)
    nn.Module.__init__(made)
    for key, value in attributes.items():
        if not _is_attribute(kind, key):
            raise ValueError(f"{key!r} is no attribute of {spec['class']}")
        setattr(made, key, value)
    return made


def _recurrent(kind: type[nn.Module], attributes: Mapping[str, Any]) -> nn.Module:
    settings = {key: attributes[key] for key in _RNN}
    if kind is nn.LSTM:
        settings["proj_size"] = attributes["proj_size"]
    if kind is nn.RNN:
        settings["nonlinearity"] = str(attributes["mode"]).removeprefix("RNN_").lower()
    return kind(**settings)


_DECODERS: Mapping[str, Callable[[Spec, Mapping[str, nn.Module]], nn.Module]] = {
    "quantizer": _quantizer,
    "rounded bias": lambda spec, quantizers: RoundedBias(*_read(spec, quantizers, 2)),
    "sum": lambda spec, quantizers: RuntimeSum(*_read(spec, quantizers, 3)),
    "hard-swish": lambda spec, quantizers: HardSwishByCodes(*_read(spec, quantizers, 1)),
    "silu": lambda spec, quantizers: SiluByCodes(*_read(spec, quantizers, 1)),
    "absorbed": _absorbed,
    "affine": _affine,
    "channels": lambda spec, quantizers: ChannelAffine(spec["channels"]),
    "layer": _layer,
}
