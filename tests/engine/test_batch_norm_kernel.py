"""BatchNorm by rows is BatchNorm: values, gradients and running statistics."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sqakd_fx.engine.batch_norm_kernel import BatchNormByRows, batch_norm_by_rows


def test_gradients_equal_finite_differences() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(
        lambda *args: BatchNormByRows.apply(*args, 1e-5)[0], (x, weight, bias)
    )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_step_equals_that_of_torch(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    own = nn.BatchNorm2d(5)
    nn.init.normal_(own.weight)
    reference = copy.deepcopy(own)
    x = (3 + torch.randn(6, 5, 4, 4)).contiguous(memory_format=layout)
    expected = reference(x)
    expected.square().sum().backward()
    with batch_norm_by_rows(own):
        found = own(x)
        found.square().sum().backward()
        torch.testing.assert_close(own.eval()(x), reference.eval()(x))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(own.weight.grad, reference.weight.grad)
    torch.testing.assert_close(own.state_dict(), reference.state_dict())
    assert "forward" not in vars(own)
