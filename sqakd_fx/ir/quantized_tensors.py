"""What is known of a quantized tensor of the integer program, and the one function that names it in a file."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

NAMESPACE = "sqakd_fx"
"""The namespace of this package's own operations."""


@dataclass(frozen=True)
class QuantizedTensor:
    """What the exported file says of a tensor of codes; `path` is what its name is made of."""

    path: str
    bits: int
    qmin: int
    qmax: int
    family: str
    granularity: str
    module: str | None = None
    made_by: str | None = None

    def properties(self) -> dict[str, str]:
        """The metadata of the tensor in an ONNX file."""
        facts = {
            "bits": self.bits,
            "qmin": self.qmin,
            "qmax": self.qmax,
            "family": self.family,
            "granularity": self.granularity,
            "module": self.module,
            "pass": self.made_by,
        }
        return {
            f"sqakd_fx.{k}": str(value) for k, value in facts.items() if value not in (None, "")
        }


def is_own_operation(node: fx.Node) -> bool:
    """True for a call of one of this package's operations."""
    return str(getattr(node.target, "namespace", "")) == NAMESPACE
