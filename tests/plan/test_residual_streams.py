"""A transformer's residual stream stays in float; sums that only look like one are integers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from common_models import compiled
from torch import Tensor, nn

from sqakd_fx.ir.op_table import Kind
from sqakd_fx.program import Program, build_program
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.recipe.resolution import resolve_recipe

TOKENS = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class SpeltOutRmsNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.float32)
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class SpeltOutLayerNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()


class PreNorm(nn.Module):
    def __init__(self, norm: Callable[[], nn.Module] = lambda: nn.LayerNorm(8)) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.norms = nn.ModuleList(norm() for _ in range(3))
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.second = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.linspace(0.1, 0.9, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.down(torch.relu(self.up(self.norms[0](x))))
        x = x + self.scale * self.second(self.norms[1](x))
        return self.head(self.norms[2](x))  # type: ignore[no-any-return]


class PostNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1, self.norm2 = nn.Linear(8, 8), nn.LayerNorm(8), nn.LayerNorm(8)
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.first(x))
        x = self.norm2(self.down(torch.relu(self.up(x))) + x)
        return self.head(x)  # type: ignore[no-any-return]


class ConvolutionalSums(nn.Module):
    """Sums of convolutions in front of a LayerNorm over channels: convolutions need their grids."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = (nn.Conv2d(c, 4, 3, padding=1) for c in (3, 4, 4))
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.a(x)
        x = x + self.b(x)
        return self.head(self.norm(x.permute(0, 2, 3, 1)).mean((1, 2)))  # type: ignore[no-any-return]


class NobodyNormalizes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(x + self.b(torch.relu(x)))  # type: ignore[no-any-return]


def program_of(model: nn.Module, x: Tensor, *settings: str) -> Program:
    return build_program(model.eval(), (x,), resolve_recipe("w8a8", settings=settings))


def float_sums(program: Program) -> int:
    reasons = [note for note in program.notes if "residual stream" in note.reason]
    assert all("residual_streams" in note.reason for note in reasons)
    return len(reasons)


def integer_arithmetic(program: Program, kind: Kind) -> int:
    return sum(node.meta.get("arithmetic") is kind for node in program.student.graph.nodes)


@pytest.mark.parametrize(
    ("model", "nodes"),
    [
        pytest.param(PreNorm, 2, id="two sums; the scale of a branch is in its layer"),
        pytest.param(lambda: PreNorm(SpeltOutRmsNorm), 5, id="RMSNorm spelt out"),
        pytest.param(lambda: PreNorm(SpeltOutLayerNorm), 5, id="LayerNorm spelt out"),
        pytest.param(lambda: PreNorm(lambda: nn.RMSNorm(8)), 2, id="RMSNorm"),
        pytest.param(PostNorm, 2, id="norm behind the sum"),
    ],
)
def test_a_stream_that_normalizations_read_stays_in_float(
    model: Callable[[], nn.Module], nodes: int
) -> None:
    program = program_of(model(), TOKENS)
    assert float_sums(program) == nodes
    assert integer_arithmetic(program, Kind.SUM) == 0
    assert integer_arithmetic(program, Kind.PRODUCT) == 0


@pytest.mark.parametrize(
    ("model", "x", "sums"), [(ConvolutionalSums, IMAGES, 2), (NobodyNormalizes, TOKENS, 1)]
)
def test_other_sums_are_integers(model: Callable[[], nn.Module], x: Tensor, sums: int) -> None:
    program = program_of(model(), x)
    assert float_sums(program) == 0
    assert integer_arithmetic(program, Kind.SUM) == sums


def test_a_recipe_quantizes_the_stream() -> None:
    program = program_of(PreNorm(), TOKENS, "residual_streams=integer")
    assert float_sums(program) == 0
    assert integer_arithmetic(program, Kind.SUM) == 2


def test_the_stream_reads_a_normalization_before_its_quantizer() -> None:
    """An outlier of a normalization's output does not coarsen the stream behind it, only the layers."""
    torch.manual_seed(0)
    model = PostNorm()
    nn.init.zeros_(model.down.weight)
    with torch.no_grad():
        model.norm1.weight[0] = 1000.0
    program = program_of(model, TOKENS)
    calibrate(program.student, [(TOKENS,)], method="minmax")
    normalized = next(n for n in program.student.graph.nodes if "norm2" in n.name)
    values: dict[str, Tensor] = {}
    for graph_module in (program.student, program.teacher):
        node = next(n for n in graph_module.graph.nodes if n.name == normalized.name)
        graph_module.graph.output(node.all_input_nodes[0])
        end = list(graph_module.graph.nodes)[-2]
        graph_module.graph.erase_node(end)
        graph_module.recompile()
        values[str(len(values))] = graph_module(TOKENS)
    ours, theirs = values.values()
    assert (ours[..., 1:] - theirs[..., 1:]).abs().max() < 0.05


@pytest.mark.parametrize("bits", ["w8a8", "w4a4", "w4a8"])
@pytest.mark.parametrize("model", [PreNorm, PostNorm, lambda: PreNorm(SpeltOutRmsNorm)])
def test_the_file_computes_what_the_graph_computes(
    model: Callable[[], nn.Module], bits: str, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    _, checked = compiled(model().eval(), (TOKENS,), {}, bits, tmp_path)
    assert checked.failures == ()
    assert checked.fusion.integer["QGemm"] >= 4
    assert "QLinearAdd" not in checked.fusion.integer
