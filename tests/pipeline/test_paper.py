"""The paper's recipes, and its networks through the whole pipeline with every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import distilled
from torch import Tensor, nn

from sqakd_fx.errors import RecipeError
from sqakd_fx.exporters.profiles import write_profile
from sqakd_fx.program import build_program, lower
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.quant.families import FAMILIES
from sqakd_fx.quant.quantizer import quantizers_of
from sqakd_fx.recipe.resolution import resolve_recipe
from sqakd_fx.results.export import export_job
from sqakd_fx.source.source import load_source
from sqakd_fx.validation.validate import validate

PAPER = Path(__file__).parents[2] / "examples" / "paper"
NETWORKS = {  # name: parameters in millions, by the papers or by hand
    "resnet20": 0.27,
    "vgg8": 3.92,
    "mobilenetv2": 2.48,
    "shufflenetv2": 1.46,
    "squeezenet": 0.83,
}
"""The deeper ones of the same blocks: `benchmarks/paper_networks.py`."""


def lively(model: nn.Module, images: Tensor) -> nn.Module:
    """With weights and statistics that let every image differ in the logits."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(images)
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_of_the_paper_comes_through_with_every_family(name: str, tmp_path: Path) -> None:
    """Families take turns over the layers, those of activations in another order than of weights."""
    source = load_source(str(PAPER / f"{name}.py"))
    parameters = sum(p.numel() for p in source.model.parameters())
    assert parameters / 1e6 == pytest.approx(NETWORKS[name], rel=0.03)
    names = list(FAMILIES)
    layers = [
        path
        for path, module in source.model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    overrides = [
        {
            "match": path,
            "weight_family": names[index % len(names)],
            "activation_family": names[(4 * index + index // len(names) + 1) % len(names)],
        }
        for index, path in enumerate(layers)
    ]
    recipe = resolve_recipe(
        {"preset": "paper/lsq-w4a4", "first_last": "same", "steps": 2, "override": overrides}
    )
    torch.manual_seed(0)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    program = build_program(lively(source.model, images), images, recipe)
    calibrate(program.student, [(images,)], method=recipe.initialization)
    used = {q.family.name for q in quantizers_of(program.student).values() if q.role == "weight"}
    assert used == set(names[: len(layers)])
    done = distilled(program, images, recipe)
    assert 1e-3 < done.loss < 1e3
    lowered = lower(program.student).graph_module
    job = export_job(lowered, program)
    path = write_profile("container", job, tmp_path / "model.onnx").path
    checked = validate(program.student, lowered, path, [(images,)])
    assert checked.student_agreement == 1.0
    for runtime in checked.runtimes:
        most = 1 if runtime.optimization == "off" else 2
        assert all(tensor.largest <= most for tensor in runtime.tensors)
        assert all(tensor.share_above(1) <= 1e-3 for tensor in runtime.tensors)


@pytest.mark.parametrize("family", ["ewgs", "pact", "lsq", "dorefa"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_every_preset_of_the_paper_is_a_recipe(family: str, bits: int) -> None:
    recipe = resolve_recipe(f"paper/{family}-w{bits}a{bits}")
    assert (recipe.weight_bits, recipe.activation_bits) == (bits, bits)
    assert recipe.weight_family == recipe.activation_family == family
    assert (recipe.granularity, recipe.first_last) == ("tensor", "float")
    assert (recipe.quantizer_rate, recipe.feature_weight) == ("absolute", 0.0)
    assert (recipe.loss, recipe.temperature, recipe.schedule) == ("auto", 4.0, "cosine")
    assert recipe.initialization == "paper"


def test_the_runs_of_the_paper_differ_by_data_set() -> None:
    def run(name: str) -> tuple[object, ...]:
        r = resolve_recipe(name)
        rates = (r.learning_rate, r.quantizer_learning_rate, r.weight_decay)
        return (r.optimizer, *rates, r.batch_size, r.epochs)

    cifar10, cifar100 = (
        ("adam", 1e-3, 1e-5, 1e-4, 256, 1200),
        ("adam", 5e-4, 5e-6, 5e-4, 64, 720),
    )
    tiny = ("sgd", 5e-4, 5e-4, 5e-4, 64, 100)
    assert run("paper/ewgs-w2a2") == run("paper/cifar10/ewgs-w2a2") == cifar10
    assert run("paper/cifar100/ewgs-w1a1") == cifar100
    assert run("paper/lsq-w3a3") == run("paper/tiny-imagenet/lsq-w3a3") == tiny
    with pytest.raises(RecipeError, match="did you mean"):
        resolve_recipe("paper/cifar11/ewgs-w2a2")
