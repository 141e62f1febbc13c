"""A sum in evaluation gives the code that ONNX Runtime's own integer kernel gives, also halfway between two codes."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from sqakd_fx.quant.quantizer import Quantizer
from sqakd_fx.quant.ranges import Range
from sqakd_fx.quant.runtime_sum import RuntimeSum

SCALES = {
    "ties exact in float32": (0.5, 0.25, 0.5),
    "ties not exact": (0.3, 0.15, 0.1),
    "ties of one input": (0.15, 0.1, 0.1),
    "none": (0.0371, 0.0119, 0.0523),
}


def quantizer(scale: float, zero_point: int) -> Quantizer:
    made = Quantizer("minmax", "activation", 8)
    low = torch.tensor(-zero_point * scale)
    for name, value in made.side.from_range(Range(low, low + 255 * scale), made.levels).items():
        getattr(made, name).copy_(value)
    made.enabled = True
    return made.requires_grad_(False)


def values(codes: Tensor, of: Quantizer) -> Tensor:
    scale, zero_point = of.scale_and_zero_point()
    return (codes - zero_point) * scale


def runtime_codes(a: Tensor, b: Tensor, grids: list[Quantizer]) -> Tensor:
    """com.microsoft.QLinearAdd on two vectors of codes."""
    names = [f"{x}_{part}" for x in "abc" for part in ("scale", "zero")]
    stored = []
    for x, grid in zip("abc", grids, strict=True):
        scale, zero_point = grid.scale_and_zero_point()
        stored += [
            helper.make_tensor(f"{x}_scale", TensorProto.FLOAT, [], [scale.item()]),
            helper.make_tensor(f"{x}_zero", TensorProto.UINT8, [], [int(zero_point)]),
        ]
    node = helper.make_node(
        "QLinearAdd", ["a", *names[:2], "b", *names[2:]], ["c"], domain="com.microsoft"
    )
    inputs = [helper.make_tensor_value_info(x, TensorProto.UINT8, [len(a)]) for x in "ab"]
    output = helper.make_tensor_value_info("c", TensorProto.UINT8, [len(a)])
    graph = helper.make_graph([node], "sum", inputs, [output], stored)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {x: codes.numpy().astype(np.uint8) for x, codes in (("a", a), ("b", b))}
    return torch.from_numpy(session.run(None, feeds)[0])


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("zero_points", [(0, 0, 0), (128, 3, 77)])
def test_every_pair_of_codes_is_rounded_as_the_runtime_rounds_it(
    name: str, zero_points: tuple[int, int, int]
) -> None:
    grids = [quantizer(s, z) for s, z in zip(SCALES[name], zero_points, strict=True)]
    a, b = (x.reshape(-1).float() for x in torch.meshgrid([torch.arange(256)] * 2, indexing="ij"))
    total = RuntimeSum(*grids).eval()(values(a, grids[0]), values(b, grids[1]))
    assert torch.equal(grids[2].codes(total), runtime_codes(a, b, grids).int())


def test_training_and_the_gradient_are_those_of_the_sum() -> None:
    grids = [quantizer(s, 0) for s in SCALES["ties not exact"]]
    a, b = (values(torch.arange(16.0), grid).requires_grad_() for grid in grids[:2])
    node = RuntimeSum(*grids)
    assert torch.equal(node.train()(a, b), a + b)
    node.eval()(a, b).sum().backward()  # type: ignore[no-untyped-call]
    assert torch.equal(a.grad, torch.ones(16))
    assert torch.equal(b.grad, torch.ones(16))
