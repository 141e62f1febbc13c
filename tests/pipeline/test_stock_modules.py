"""Stock torch modules in the forms that people use: each comes through whole, and equals the model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from common_models import compiled
from torch import Tensor, nn
from torch.nn import functional as F

from sqakd_fx.ir.outputs import tensors_of
from sqakd_fx.runtime.session import session
from sqakd_fx.source.inputs import training_inputs

IDS = torch.tensor([[3, 7, 2, 0, 0], [5, 1, 8, 9, 4], [6, 2, 0, 0, 0], [1, 9, 4, 3, 0]])
IMAGE = torch.randn(4, 6, 9, 11, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(4, 7, 6, generator=torch.Generator().manual_seed(1))
VOLUME = torch.randn(2, 4, 7, 6, 9, generator=torch.Generator().manual_seed(2))


class Encoder(nn.Module):
    """A padded batch through nn.TransformerEncoder."""

    def __init__(self, batch_first: bool, norm_first: bool) -> None:
        super().__init__()
        self.emb = nn.Embedding(10, 16, padding_idx=0)
        layer = nn.TransformerEncoderLayer(
            16, 2, 24, batch_first=batch_first, norm_first=norm_first
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
        self.batch_first = batch_first

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids)
        x = x if self.batch_first else x.transpose(0, 1)
        y = self.layers(x, src_key_padding_mask=ids == 0)
        return (y if self.batch_first else y.transpose(0, 1)).mean(1)


class CausalLayer(nn.Module):
    """One layer alone, with a mask of minus infinity that is said to be causal."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(6, 2, 12, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.layer(x, src_mask=mask, is_causal=True)


class Decoder(nn.Module):
    """A decoder layer that reads what an encoder gives, both padded."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(10, 16, padding_idx=0)
        self.layers = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(16, 2, 24, batch_first=True), 1
        )

    def forward(self, ids: Tensor) -> Tensor:
        memory, target = self.emb(ids), self.emb(ids.flip(1))
        mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
        return self.layers(target, memory, tgt_mask=mask, memory_key_padding_mask=ids == 0)


class Weights(nn.Module):
    """Attention whose weights are an output, and whose packed projection is read by its owner."""

    def __init__(self, average: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.average = average

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, weights = self.attention(x, x, x, average_attn_weights=self.average)
        return y, weights, y.mean() + self.attention.in_proj_weight.mean()


class Recurrent(nn.Module):
    """Layers, both directions, and every output of a recurrent module."""

    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.rnn = kind(6, 5, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y, state = self.rnn(x)
        return (self.head(y[:, -1]), *tensors_of_state(state))


def tensors_of_state(state: Any) -> tuple[Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


class Divided(nn.Module):
    """A convolution and an average pool with a divisor of its own."""

    def __init__(self, conv: nn.Module, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.pool = conv, pool

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.conv(x))


class Unpooled(nn.Module):
    """Maxima go back to where they came from."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(4, 3, 1)
        self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv(x))
        small, places = self.pool(y)
        return self.head(self.unpool(small, places, output_size=y.shape[2:]))


class Places(nn.Module):
    """The places of maxima are an output of the model."""

    def __init__(self, pool: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(6, 4, 3), pool

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values, places = self.pool(torch.relu(self.conv(x)))
        return values * 2, places


class Swapped(nn.Module):
    """Both halves of the channels change places in front of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(6, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = torch.cat(x.chunk(2, 1)[::-1], 1)
        left, right = (x - x.mean(1, keepdim=True)).chunk(2, 1)
        return self.second(torch.cat([right, left], 1))


class Halves(nn.Module):
    """A batch of two images each, divided by a traced size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        a, b = torch.split(self.conv(torch.cat([x, x.flip(3)], 0)), [n, n], 0)
        return a * b


def divided(pool: Callable[[Tensor], Tensor]) -> nn.Module:
    return Divided(nn.Conv2d(6, 4, 3), pool)


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "encoder": (lambda: Encoder(True, False), IDS),
    "encoder, norm first": (lambda: Encoder(True, True), IDS),
    "encoder, sequence first": (lambda: Encoder(False, False), IDS),
    "causal layer": (CausalLayer, ROWS),
    "decoder": (Decoder, IDS),
    "attention weights": (lambda: Weights(True), ROWS),
    "attention weights of each head": (lambda: Weights(False), ROWS),
    "lstm": (lambda: Recurrent(nn.LSTM), ROWS),
    "gru": (lambda: Recurrent(nn.GRU), ROWS),
    "rnn": (lambda: Recurrent(nn.RNN), ROWS),
    "divisor": (lambda: divided(lambda x: F.avg_pool2d(x, 2, divisor_override=3)), IMAGE),
    "divisor, padded": (lambda: divided(nn.AvgPool2d(3, 2, 1, divisor_override=5)), IMAGE),
    "divisor, rounded up": (
        lambda: divided(nn.AvgPool2d((2, 3), (3, 2), ceil_mode=True, divisor_override=2)),
        IMAGE,
    ),
    "divisor of a volume": (
        lambda: Divided(nn.Conv3d(4, 3, 3), nn.AvgPool3d(2, padding=1, divisor_override=7)),
        VOLUME,
    ),
    "unpooled": (Unpooled, IMAGE),
    "places of maxima": (lambda: Places(nn.MaxPool2d(2, return_indices=True)), IMAGE),
    "places of maxima by function": (
        lambda: Places(lambda x: F.max_pool2d(x, 3, 2, return_indices=True)),
        IMAGE,
    ),
    "places of adaptive maxima": (
        lambda: Places(nn.AdaptiveMaxPool2d((1, 1), return_indices=True)),
        IMAGE,
    ),
    "swapped halves": (Swapped, IMAGE),
    "split by a size": (Halves, IMAGE),
}


SEVERAL_OUTPUTS = ("gru", "unpooled", "split by a size")
"""Models with an operation of several outputs in the file."""


@pytest.mark.parametrize(
    ("name", "profile"),
    [(name, "container") for name in MODELS] + [(name, "packed") for name in SEVERAL_OUTPUTS],
)
def test_a_stock_module_comes_through_as_it_is(name: str, profile: str, tmp_path: Path) -> None:
    make, example = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    _, checked = compiled(model, (example,), {}, "w8a8", tmp_path, profile)
    assert checked.failures == ()
    with torch.no_grad(), plain_path():
        wanted = tensors_of(model(example))
    got = run(tmp_path / "model.onnx", example)
    assert len(got) == len(wanted)
    for a, b in zip(wanted, got, strict=True):
        assert a.shape == b.shape
        if a.is_floating_point():  # 8 bits of a network with random weights
            assert float((a - b).pow(2).mean().sqrt()) <= 0.1 * float(a.abs().max()) + 0.02


@contextlib.contextmanager
def plain_path() -> Iterator[None]:
    """Without torch's fused encoder, which gives zeros at padded positions."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def run(path: Path, example: Tensor) -> list[Tensor]:
    one: onnxruntime.InferenceSession = session(path)
    return [torch.from_numpy(y) for y in one.run(None, {one.get_inputs()[0].name: example.numpy()})]


class OneAtATime(nn.Module):
    """A forward that is written for a batch of one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(1, 4, 3, 2), nn.Linear(28, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(x.view(1, 1, 16))).reshape(1, 28)).squeeze(0)


class FourAtATime(nn.Module):
    """A forward with the batch size written into it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(6, 8, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).mean((2, 3)).view(4, 8))


def test_a_model_for_a_batch_of_four_is_compared_on_batches_of_four(tmp_path: Path) -> None:
    program, checked = compiled(FourAtATime().eval(), (IMAGE,), {}, "w8a8", tmp_path)
    assert checked.failures == ()
    inputs = training_inputs(torch.randn(60, 6, 9, 11), program)
    assert {len(batch[0]) for batch in inputs.epoch(0)} == {4}
    assert inputs.undivided == "the model takes batches of 4 only"


def test_a_model_for_a_batch_of_one_has_a_fixed_batch_axis_and_says_so(tmp_path: Path) -> None:
    torch.manual_seed(0)
    example = torch.randn(1, 1, 16)
    program, checked = compiled(OneAtATime().eval(), (example,), {}, "w8a8", tmp_path)
    assert checked.failures == ()
    assert any("example's batch size only" in note.reason for note in program.notes)
    assert session(tmp_path / "model.onnx").get_inputs()[0].shape == [1, 1, 16]
