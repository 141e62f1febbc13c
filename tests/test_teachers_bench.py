"""Teachers are trained over several processes as in one, and learn; published ones are read as they are."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sqakd_fx.program import build_program

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import image_sets  # noqa: E402
from cifar_networks import NETWORKS  # noqa: E402
from image_sets import BATCH, IMAGE_SETS, ImageSet  # noqa: E402
from resnet20_padded import PaddedResNet20  # noqa: E402
from teachers import Training, erased, schedule_of  # noqa: E402

CPU = torch.device("cpu")


def bright_and_dark() -> tuple[ImageSet, Tensor, Tensor]:
    """Two batches of images whose label is their brightness."""
    torch.manual_seed(0)
    labels = torch.randint(0, 10, (2 * BATCH,))
    pixels = (labels[:, None, None, None] * 25).expand(-1, 3, 32, 32).to(torch.uint8).contiguous()
    return replace(IMAGE_SETS["cifar10"], train_images=len(labels)), pixels, labels


def test_a_run_that_was_stopped_ends_where_one_without_a_stop_does(tmp_path: Path) -> None:
    data, pixels, labels = bright_and_dark()
    schedule = schedule_of("resnet20", 3)
    whole = Training("resnet20", schedule, tmp_path / "whole", CPU)
    (tmp_path / "parts").mkdir()
    for _ in range(3):
        whole.run_epoch(data, pixels, labels)
        part = Training("resnet20", schedule, tmp_path / "parts", CPU)
        part.run_epoch(data, pixels, labels)
        part.keep()
    wanted, found = whole.network.state_dict(), part.network.state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_a_state_of_other_epochs_is_refused(tmp_path: Path) -> None:
    Training("resnet20", schedule_of("resnet20", 3), tmp_path, CPU).keep()
    with pytest.raises(SystemExit, match="give --epochs 3"):
        Training("resnet20", schedule_of("resnet20", 4), tmp_path, CPU)


def test_the_loss_falls(tmp_path: Path) -> None:
    data, pixels, labels = bright_and_dark()
    training = Training("resnet20", replace(schedule_of("resnet20", 4), warm_up=0), tmp_path, CPU)
    losses = [training.run_epoch(data, pixels, labels) for _ in range(4)]
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_takes_a_step(name: str, tmp_path: Path) -> None:
    data, pixels, labels = bright_and_dark()
    few = replace(data, train_images=BATCH)
    training = Training(name, schedule_of(name, 1), tmp_path, CPU)
    before = [p.detach().clone() for p in training.network.parameters()]
    training.run_epoch(few, pixels[:BATCH], labels[:BATCH])
    assert all(not torch.equal(a, b) for a, b in zip(before, training.network.parameters()))


def test_one_square_of_each_image_is_erased() -> None:
    ((x, _),) = erased([(torch.ones(64, 3, 32, 32), torch.zeros(64))], 0)
    zeros = (x == 0).sum((2, 3))
    assert (zeros[:, :1] == zeros).all()
    assert 0 < int(zeros.min()) <= int(zeros.max()) == 64


def test_pixels_of_the_npm_package_are_images_of_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    Image.fromarray(wanted.reshape(2, 1024, 3)).save(tmp_path / "test_batch.png")
    (tmp_path / "test_lables.json").write_text(json.dumps([3, 8]))
    monkeypatch.setattr(image_sets, "PIXELS", tmp_path)
    pixels, labels = IMAGE_SETS["cifar10-png"].read("test", tmp_path)
    assert labels.tolist() == [3, 8]
    assert np.array_equal(pixels.permute(0, 2, 3, 1).numpy(), wanted)


def test_the_resnet_of_the_paper_is_quantized_whole() -> None:
    network = PaddedResNet20().eval()
    assert sum(x.numel() for x in network.parameters()) == 269_722
    program = build_program(network, torch.randn(2, 3, 32, 32), "w4a4")
    assert not program.traced.float_modules
