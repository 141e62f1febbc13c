"""What Python does with the parts of a tensor: slices, sums of lists, unpacking, reversal."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sqakd_fx.frontend.trace import trace
from sqakd_fx.ir.outputs import largest_difference, tensors_of
from sqakd_fx.program import build_program

SIGNAL = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0))


def unpacked(x: Tensor) -> Tensor:
    first, *rest = x.unbind(1)
    return torch.stack([*rest, first], 1)


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "in reverse": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "a part of the parts": lambda x: torch.cat(x.split(2, 1)[1:], 1),
    "two slices": lambda x: torch.cat(x.chunk(3, 1)[2:] + x.chunk(3, 1)[:2], 1),
    "one of a slice": lambda x: x.tensor_split(3, 1)[1:][0],
    "reversed": lambda x: torch.stack(list(reversed(x.unbind(2)))),
    "unpacked": unpacked,
    "as many as there are": lambda x: x.split([1, 2, 3], 1)[len(x.split([1, 2, 3], 1)) - 1],
    "added up": lambda x: sum(x.chunk(3, 1)[1:], x[:, :2]),
}


class Parts(nn.Module):
    def __init__(self, form: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.form = nn.Conv1d(6, 6, 1), form

    def forward(self, x: Tensor) -> Tensor:
        return self.form(self.conv(x)) * 2


@pytest.mark.parametrize("form", FORMS)
def test_parts_are_taken_apart_in_the_graph(form: str) -> None:
    model = Parts(FORMS[form]).eval()
    program = build_program(model, SIGNAL, "w8a8")
    assert trace(model, SIGNAL).front_end == "symbolic"
    names = {str(getattr(n.target, "__name__", n.target)) for n in program.student.graph.nodes}
    assert not names & {"chunk", "split", "unbind", "tensor_split"}
    with torch.no_grad():
        got = tensors_of(program.student(SIGNAL))
        assert largest_difference(tensors_of(model(SIGNAL)), got) <= 1e-6


@pytest.mark.parametrize(
    "index", [[slice(None), slice(1, 5, 2)], [..., slice(2)], [slice(1, 3), None]], ids=str
)
def test_a_list_of_slices_is_a_tuple_in_the_graph(index: list[object]) -> None:
    """Torch warns of a list each time, and is to read it as one index of values."""
    model = Parts(lambda x: x[index]).eval()  # type: ignore[index]
    graph_module = trace(model, SIGNAL).graph_module
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = graph_module(SIGNAL)
    torch.testing.assert_close(found, model(SIGNAL))
