"""nn.TransformerEncoder: where the graph computes more than torch's fused path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sqakd_fx.program import build_program

PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
TEXTS = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


class Encodes(nn.Module):
    def __init__(self, *, nested: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=nested)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.encoder(x, src_key_padding_mask=padding)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
def test_padded_positions_that_the_fused_path_makes_zero_are_noted() -> None:
    model = Encodes(nested=True).eval()
    program = build_program(model, (TEXTS, PADDING), "w8a8")
    with torch.no_grad():
        fused, ours = model(TEXTS, PADDING), program.teacher(TEXTS, PADDING)
    torch.testing.assert_close(fused[~PADDING], ours[~PADDING])
    assert not fused[PADDING].any()
    assert ours[PADDING].all()
    assert [n.node for n in program.notes if "padded positions" in n.reason] == ["encoder"]


@pytest.mark.parametrize(("nested", "example"), [(False, (TEXTS, PADDING)), (True, (TEXTS,))])
def test_nothing_is_noted_where_the_fused_path_makes_nothing_zero(
    nested: bool, example: tuple[Tensor, ...]
) -> None:
    program = build_program(Encodes(nested=nested), example, "w8a8")
    assert not any("padded positions" in note.reason for note in program.notes)
