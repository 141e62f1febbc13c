"""Integer operations compute whole numbers, however large their sums are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import sqakd_fx.ir.integer_ops  # noqa: F401  (registers torch.ops.sqakd_fx)

_OPS = torch.ops.sqakd_fx
_ONE = torch.tensor(1.0)


def _codes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


@pytest.mark.parametrize("zero_point", [0, 128, 255])
@pytest.mark.parametrize("size", [200, 515, 520, 1100, 5000])
def test_a_layer_is_exact_at_the_bounds_of_float32(size: int, zero_point: int) -> None:
    """127 · 255 · 519 is beyond 2**24."""
    z = torch.tensor(zero_point, dtype=torch.uint8)
    x = torch.cat([_codes(1, size), torch.full((1, size), 255, dtype=torch.uint8)])
    ones, half = torch.full((1, size), 127), torch.full((1, size), 127)
    half[:, ::2] = -127
    odd = torch.randint(-127, 128, (1, size))
    weight = torch.cat([ones, half, odd]).to(torch.int8)
    wanted = (x.long() - zero_point) @ weight.long().T
    got = _OPS.linear(x, _ONE, z, weight, _ONE, _ONE, None)
    assert torch.equal(got.long(), wanted)
    images, kernels = x[:, :, None, None], weight[:, :, None, None]
    sums = _OPS.conv(images, _ONE, z, kernels, _ONE, _ONE, None, [1, 1], [0, 0], [1, 1], 1)
    assert torch.equal(sums.flatten(1).long(), wanted)


@pytest.mark.parametrize("size", [257, 259, 2000])
def test_a_product_of_activations_is_exact_at_the_bounds_of_float32(size: int) -> None:
    z = torch.tensor(0, dtype=torch.uint8)
    a, b = _codes(2, 3, size), _codes(2, size, 4)
    a[0], b[0] = 255, 255
    got = _OPS.matmul(a, _ONE, z, b, _ONE, z)
    assert torch.equal(got.long(), a.long() @ b.long())


@pytest.mark.parametrize(
    ("stride", "padding", "dilation"), [(1, 0, 1), (2, 1, 1), (3, 4, 2), (1, 0, 3)]
)
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_the_size_of_a_convolution_is_known_before_it_runs(
    axes: int, stride: int, padding: int, dilation: int
) -> None:
    function = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
    settings = [[n] * axes for n in (stride, padding, dilation)]
    with FakeTensorMode():
        x = torch.empty((2, 4, *range(9, 9 + axes)), dtype=torch.uint8)
        weight = torch.empty((6, 2, *([3] * axes)), dtype=torch.int8)
        z = torch.tensor(0, dtype=torch.uint8)
        one = torch.tensor(1.0)
        made = _OPS.conv(x, one, z, weight, one, one, None, *settings, 2)
        wanted = function(x.float(), weight.float(), None, *settings, 2)
    assert made.shape == wanted.shape


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ((2, 3, 4, 5), (2, 3, 5, 6)),
        ((2, 1, 4, 5), (1, 3, 5, 6)),
        ((4, 5), (2, 5, 6)),
        ((5,), (5, 2)),
    ],
)
def test_the_size_of_a_product_is_known_before_it_runs(
    left: tuple[int, ...], right: tuple[int, ...]
) -> None:
    with FakeTensorMode():
        a, b = (torch.empty(shape, dtype=torch.uint8) for shape in (left, right))
        z, one = torch.tensor(0, dtype=torch.uint8), torch.tensor(1.0)
        made = _OPS.matmul(a, one, z, b, one, z)
        wanted = torch.matmul(a.float(), b.float())
    assert made.shape == wanted.shape
