from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from model_files import EXAMPLE, LINEAR, refused, write
from safetensors.torch import save_file
from torch import nn

from sqakd_fx.source.source import load_source

pytestmark = pytest.mark.usefixtures("clean_imports")

STATE = {"weight": torch.full((2, 4), 0.5), "bias": torch.ones(2)}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("w.safetensors", STATE),
        ("w.pt", STATE),
        ("w.pth", {"epoch": 3, "state_dict": STATE}),
        ("w.bin", {f"module.{name}": tensor for name, tensor in STATE.items()}),
    ],
)
def test_weights_come_from_a_state_dict(tmp_path: Path, name: str, content: Any) -> None:
    file = tmp_path / name
    if file.suffix == ".safetensors":
        save_file(content, file)
    else:
        torch.save(content, file)
    source = load_source(write(tmp_path, LINEAR + EXAMPLE), weights=file)
    assert torch.equal(source.model.weight, STATE["weight"])  # type: ignore[arg-type]


def test_tied_weights_may_be_stored_once(tmp_path: Path) -> None:
    text = """
    import torch
    from torch import nn
    def model():
        a, b = nn.Linear(4, 4), nn.Linear(4, 4)
        b.weight = a.weight
        return nn.Sequential(a, b, nn.BatchNorm1d(4))
    """
    spec = write(tmp_path, text)
    state = load_source(spec, input_shape=(1, 4)).model.state_dict()
    kept = {k: v for k, v in state.items() if k not in ("1.weight", "2.num_batches_tracked")}
    save_file(kept, tmp_path / "w.safetensors")
    load_source(spec, input_shape=(1, 4), weights=tmp_path / "w.safetensors")


def saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("w.safetensors", b"nonsense", ["cannot be read"]),
        ("w.pt", b"nonsense", ["cannot be read"]),
        ("w.pt", b"", ["cannot be read"]),
        ("w.pt", saved(nn.Linear(4, 2)), ["refused", "could run code"]),
        ("w.pt", saved(STATE["bias"]), ["a Tensor, not a state dict"]),
        ("w.pt", saved({"epoch": 3}), ["epoch", "not tensors"]),
        ("w.pt", saved({"weight": STATE["weight"]}), ["missing bias"]),
        ("w.pt", saved(STATE | {"extra": torch.ones(1)}), ["unexpected extra"]),
        ("w.pt", saved(STATE | {"bias": torch.ones(3)}), ["bias (3,) instead of (2,)"]),
        (
            "w.pt",
            saved({f"layer{i}": torch.ones(1) for i in range(8)}),
            ["missing weight, bias", "layer4 and 3 more"],
        ),
        ("w.pt", saved(STATE | {"bias": torch.tensor([1, torch.nan])}), ["'bias'", "1 NaN"]),
        ("w.pt", saved(STATE | {"weight": torch.full((2, 4), torch.inf)}), ["'weight'", "8 NaN"]),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    tmp_path: Path, name: str, content: bytes, parts: list[str]
) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    message = str(refused(write(tmp_path, LINEAR + EXAMPLE), weights=file))
    for part in parts:
        assert part in message


def test_weights_and_data_that_are_not_there_are_told_with_what_is_near(tmp_path: Path) -> None:
    spec = write(tmp_path, LINEAR + EXAMPLE)
    (tmp_path / "weights.pt").touch()
    assert "weights.pt" in str(refused(spec, weights=tmp_path / "weihgts.pt"))
    assert "is a folder" in str(refused(spec, weights=tmp_path))
    assert "weights.pt" in str(refused(spec, data=tmp_path / "weight"))
    assert ".npy or .npz" in str(refused(spec, data=tmp_path / "weights.pt"))
