"""Inputs made of BatchNorm's statistics: nearer to them than noise, repeatable, and refused where there are none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_files import LINEAR, write
from torch import Tensor, nn

from sqakd_fx.errors import SourceError
from sqakd_fx.source.source import load_source
from sqakd_fx.source.synthetic import DataFree, SyntheticSamples, synthetic_samples

FEW = DataFree(samples=48, steps=40)


def trained() -> nn.Sequential:
    """A network whose statistics are those of bright, smooth images."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, momentum=None), nn.ReLU(),
        nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, momentum=None), nn.Flatten(), nn.Linear(4 * 64, 3),
    )  # fmt: skip
    images = 2 + torch.randn(64, 1, 3, 3).repeat_interleave(4, 2).repeat_interleave(4, 3)
    net(images)
    return net.eval()


def made(net: nn.Module, seed: int = 0) -> SyntheticSamples:
    return synthetic_samples(net, torch.zeros(2, 1, 12, 12), FEW, batch_size=32, seed=seed)


def test_they_are_far_nearer_to_the_statistics_than_noise_is() -> None:
    samples = made(trained())
    reached, noise = samples.distance
    assert reached < noise / 10
    assert samples.layers == 2
    assert samples.samples.mean() > 1
    assert len(samples) == 48
    assert samples[47].shape == (1, 12, 12)


def test_a_seed_gives_the_same_samples_and_another_seed_others() -> None:
    one, same, other = (made(trained(), seed).samples for seed in (3, 3, 4))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_the_model_is_not_changed() -> None:
    net = trained()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    made(net)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_every_step_is_told() -> None:
    told: list[tuple[int, int]] = []
    synthetic_samples(
        trained(), torch.zeros(2, 1, 12, 12), DataFree(8, 3), batch_size=4,
        on_step=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert told == [(step, 6) for step in range(1, 7)]


def test_rows_of_a_table_have_the_statistics_too() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, momentum=None), nn.Linear(8, 2))
    net(5 + torch.randn(64, 6))
    samples = synthetic_samples(net.eval(), {"input": torch.zeros(1, 6)}, DataFree(48, 200))
    assert samples.samples.shape == (48, 6)
    assert samples.distance[0] < samples.distance[1] / 10


class Two(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


@pytest.mark.parametrize(
    ("net", "example", "said"),
    [
        (nn.Linear(4, 2), torch.zeros(1, 4), "the model has none: give real inputs"),
        (nn.BatchNorm1d(4), torch.zeros(2, 4), "are the initial ones: load trained weights"),
        (Two(), (torch.zeros(1, 4), torch.zeros(1, 4)), "takes 2 (float32, float32)"),
        (nn.Embedding(4, 2), torch.zeros(1, 4, dtype=torch.int64), "takes 1 (int64)"),
    ],
)
def test_a_model_whose_statistics_say_nothing_is_refused(
    net: nn.Module, example: Tensor | tuple[Tensor, ...], said: str
) -> None:
    with pytest.raises(SourceError) as raised:
        synthetic_samples(net.eval(), example)
    assert said in str(raised.value)


def test_a_source_without_data_does_not_ask_the_file_for_any(tmp_path: Path) -> None:
    text = LINEAR + "def train_data():\n    raise OSError('no photographs here')\n"
    source = load_source(write(tmp_path, text), data=FEW, input_shape=(2, 4))
    assert source.train_data == FEW
