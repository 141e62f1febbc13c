"""A convolution of INT8 in ExecuTorch, with five things behind it: which of them XNNPACK computes right.

    pip install executorch
    python benchmarks/executorch_faults.py

Each is a program of its own: quantized images, weights with a scale for each channel. Errors are to PyTorch, with
XNNPACK and with ExecuTorch's portable kernels alone. The profile `pt2e` keeps to forms that are right where it can.
"""

from __future__ import annotations

from collections.abc import Callable

import executorch.kernels.quantized  # noqa: F401  (dequantizes the weights of layers in float)
import torch
import torch.ao.quantization.fx._decomposed
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime
from torch import Tensor, nn

_Q = torch.ops.quantized_decomposed


def pair(x: Tensor, scale: float, zero_point: int) -> Tensor:
    numbers = (scale, zero_point, -128, 127, torch.int8)
    return _Q.dequantize_per_tensor.default(_Q.quantize_per_tensor.default(x, *numbers), *numbers)


class Layer(nn.Module):
    def __init__(self, behind: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.behind = behind
        self.register_buffer("codes", torch.randint(-60, 60, (8, 3, 3, 3), dtype=torch.int8))
        self.register_buffer("scale", torch.rand(8) * 0.01 + 0.001)
        self.register_buffer("zero", torch.zeros(8, dtype=torch.int64))
        self.register_buffer("bias", torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        given = (self.codes, self.scale, self.zero, 0, -128, 127, torch.int8)
        weight = _Q.dequantize_per_channel.default(*given)
        return self.behind(torch.conv2d(pair(x, 0.02, 0), weight, self.bias, [1, 1], [1, 1]))


BEHIND: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing: the output is float": lambda y: y,
    "a pair": lambda y: pair(y, 0.1, -128),
    "a ReLU, a pair": lambda y: pair(torch.relu(y), 0.1, -128),
    "a clamp, a pair": lambda y: pair(torch.clamp(y, 0, 1.5), 0.1, -128),
    "a pair, a clamp, a pair": lambda y: pair(torch.clamp(pair(y, 0.1, -128), 0, 1.5), 0.1, -128),
}


def main() -> None:
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    print("| behind the convolution | with XNNPACK | portable kernels |\n|---|---|---|")
    for name, behind in BEHIND.items():
        torch.manual_seed(0)
        layer = Layer(behind)
        program, wanted, errors = torch.export.export(layer, (x,)), layer(x), []
        for parts in ([XnnpackPartitioner()], []):
            made = to_edge_transform_and_lower(program, partitioner=parts).to_executorch()
            (got,) = Runtime.get().load_program(made.buffer).load_method("forward").execute([x])
            errors.append(f"{float((got - wanted).norm() / wanted.norm()):.1e}")
        print(f"| {name} | {' | '.join(errors)} |", flush=True)


if __name__ == "__main__":
    main()
