"""What a report says of sizes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import sqakd_fx
from sqakd_fx.recipe.resolution import resolve_recipe

FIRST_READS_FLOAT = 'override=[{match="first", float="activations"}]'


class Reader(nn.Module):
    """A table, a recurrent layer and two linear layers, one of which reads its input in float."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 16)
        self.cell = nn.LSTM(16, 16, batch_first=True)
        self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        found, _ = self.cell(self.table(tokens))
        return self.last(torch.relu(self.first(found.mean(1))))


def test_every_weight_in_codes_counts_at_its_bits_also_where_its_layer_computes_in_float(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    model = Reader().eval()
    tokens = torch.randint(0, 64, (32, 6))
    result = sqakd_fx.quantize(
        model,
        tokens,
        example_inputs=tokens[:2],
        recipe=resolve_recipe("w8a8", settings=["steps=1", FIRST_READS_FLOAT]),
        out=tmp_path / "run",
    )
    assert result is not None
    matrices = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    others = sum(p.numel() for p in model.parameters() if p.ndim < 2)
    assert result.report["nominal_weight_bytes"] == matrices + 4 * others
