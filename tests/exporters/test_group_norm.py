"""Group normalization is written with the runtime's own kernel, and is what torch computes."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from sqakd_fx.program import build_program
from sqakd_fx.results.export import export
from sqakd_fx.runtime.session import session


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("shape", [(6,), (6, 5), (6, 4, 5), (6, 2, 3, 4)], ids=str)
def test_every_group_norm_is_what_torch_computes(
    shape: tuple[int, ...], groups: int, affine: bool, tmp_path: Path
) -> None:
    if len(shape) == 1 and groups == 6:
        pytest.skip("torch refuses groups of one value")
    torch.manual_seed(0)
    norm = nn.GroupNorm(groups, 6, affine=affine, eps=1e-3)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    model = nn.Sequential(norm, nn.Flatten(), nn.LazyLinear(3)).eval()
    x = 100 + 3 * torch.randn(4, *shape)
    wanted = model(x)
    program = build_program(model, x[:2], "w8a8")
    path = export(program, program.teacher, tmp_path / "float.onnx", profile="float").path
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert "InstanceNormalization" in kinds
    assert "GroupNormalization" not in kinds
    found = session(path).run(None, {program.input_names[0]: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-4)
