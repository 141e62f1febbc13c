"""Networks and helpers that many tests share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sqakd_fx
from sqakd_fx.program import Program, distillation_teacher
from sqakd_fx.recipe.keys import Recipe
from sqakd_fx.training.keeping import Keeping
from sqakd_fx.training.loop import Distilled, distil
from sqakd_fx.training.progress import Listener, StepReport
from sqakd_fx.training.step_batches import TrainingData

torch.set_num_threads(1)
# Of commands that tests start as well: where threads share a core they wait for one another by spinning.
os.environ["OMP_NUM_THREADS"] = "1"

EXAMPLE = Path(__file__).parent.parent / "examples" / "fashion" / "model.py"


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=True)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.short = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.short(x))


class ResidualNet(nn.Module):
    """Strided residual blocks, BatchNorm with negative and zero multipliers, max and average pool."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.layers = nn.Sequential(Block(8, 8, 1), Block(8, 16, 2))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.bn(self.conv(x))), 2)
        return self.fc(torch.flatten(self.pool(self.layers(x)), 1))


def with_lively_batch_norm(model: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """Statistics from data, and multipliers of both signs, some of them 0."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.weight, 0.8, 0.6)
            nn.init.normal_(module.bias, 0, 0.3)
            with torch.no_grad():
                module.weight[0] = 0.0
    model.train()
    with torch.no_grad():
        for _ in range(8):
            model(torch.randn(16, *shape[1:]))
    return model.eval()


def distilled(
    program: Program,
    inputs: Tensor,
    recipe: Recipe,
    *,
    on_report: Callable[[StepReport], None] = lambda report: None,
    **keeping: Any,
) -> Distilled:
    """The student of `program` trained on one batch, again and again, on the CPU."""
    return distil(
        program.student,
        distillation_teacher(program),
        TrainingData(lambda epoch: [(inputs,)], 1),
        recipe,
        torch.device("cpu"),
        Keeping(**keeping),
        Listener(on_report),
    )


@pytest.fixture
def residual_net() -> nn.Module:
    torch.manual_seed(0)
    return with_lively_batch_norm(ResidualNet(), (1, 3, 16, 16))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def clean_imports(tmp_path: Path) -> Iterator[None]:
    """Modules that a test's own files bring are gone after it."""
    path = list(sys.path)
    yield
    sys.path[:] = path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture(scope="session")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result folder of a small classifier, made once."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 6)).eval()
    images = torch.randn(96, 1, 8, 8)
    out = tmp_path_factory.mktemp("report") / "net"
    recipe = {"steps": 2, "batch_size": 16, "learning_rate": 1e-5, "activation_bits": 8}
    labelled = [(images[:40], net(images[:40]).argmax(1))]
    done = sqakd_fx.quantize(
        net,
        images,
        example_inputs=images[:2],
        recipe=recipe,
        out=out,
        eval_data=labelled,
        progress=False,
    )
    assert done is not None
    return out
