from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from model_files import EXAMPLE, LINEAR, refused, write
from safetensors.torch import save_file
from torch import nn

from sqakd_fx.errors import SourceError
from sqakd_fx.pipeline import Silent, run
from sqakd_fx.recipe.resolution import resolve_recipe
from sqakd_fx.source.source import Source, load_source

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


OTHER = {"weight": torch.full((2, 4), 0.25), "bias": torch.zeros(2)}


def under(prefix: str, state: dict[str, Any] = STATE) -> dict[str, Any]:
    return {f"{prefix}{name}": value for name, value in state.items()}


def loaded(folder: Path, content: Any, key: str = "") -> Source:
    torch.save(content, folder / "w.pt")
    return load_source(write(folder, LINEAR + EXAMPLE), weights=Path(f"{folder / 'w.pt'}{key}"))


@pytest.mark.parametrize(
    "content",
    [
        under("module."),
        under("_orig_mod."),
        under("_orig_mod.module."),
        under("module._orig_mod."),
        under("_fsdp_wrapped_module."),
        {"n_averaged": torch.tensor(7), **under("module.")},
        {"state_dict": under("model."), "epoch": 3, "hyper_parameters": {"lr": 0.1}},
        {"state_dict": under("net.module.")},
        {"net": STATE, "acc": 93.1, "epoch": 7},
        {
            "model": STATE,
            "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []},
        },
        {"ema": STATE},
        {"ema": {"module": under("module."), "decay": 0.9}},
        {"params": STATE, "step": torch.tensor(3)},
        {"weights": {"best": STATE}},
    ],
    ids=lambda content: ", ".join(content),
)
def test_keys_and_prefixes_of_tools_are_taken_off(tmp_path: Path, content: Any) -> None:
    source = loaded(tmp_path, content)
    assert torch.equal(source.model.weight, STATE["weight"])  # type: ignore[arg-type]
    assert source.notes == ()


@pytest.mark.parametrize(
    ("content", "taken", "other"),
    [
        ({"ema": OTHER, "model": STATE}, "model", "ema"),
        ({"state_dict": STATE, "ema_state_dict": OTHER}, "state_dict", "ema_state_dict"),
        (
            {"state_dict_ema": OTHER, "state_dict": under("module.")},
            "state_dict.module",
            "state_dict_ema",
        ),
        ({"params_ema": OTHER, "params": STATE}, "params", "params_ema"),
        ({"model": STATE, "ema": {"module": OTHER}}, "model", "ema.module"),
        (
            {"state_dict": under("ema_model.", OTHER) | under("model.")},
            "state_dict.model",
            "state_dict.ema_model",
        ),
        ({"teacher": OTHER, "student": STATE}, "teacher", "student"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else value,
)
def test_of_a_model_and_its_average_the_run_says_which_it_took(
    tmp_path: Path, content: Any, taken: str, other: str
) -> None:
    source = loaded(tmp_path, content)
    (note,) = source.notes
    assert f"as {taken} and as {other}: {taken} is taken" in note
    assert note.endswith(f"--weights {tmp_path / 'w.pt'}:{other} takes the other")
    one, two = source.model.weight, loaded(tmp_path, content, f":{other}").model.weight
    assert not torch.equal(one, two)  # type: ignore[arg-type]
    assert loaded(tmp_path, content, f":{other}").notes == ()


def test_equal_weights_under_two_keys_are_no_choice(tmp_path: Path) -> None:
    assert loaded(tmp_path, {"model": STATE, "ema": STATE}).notes == ()


def test_what_lies_beside_a_prefix_is_told(tmp_path: Path) -> None:
    state = under("model.") | {"criterion.scale": torch.ones(1)}
    (note,) = loaded(tmp_path, {"state_dict": state}).notes
    assert "state_dict.model is taken, without what lies beside it (criterion.scale)" in note


def test_a_key_that_a_file_has_not_is_refused_with_those_that_it_has(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no weights under the key 'best'.*model, ema"):
        loaded(tmp_path, {"model": STATE, "ema": OTHER}, ":best")


def test_a_run_says_which_weights_it_took(tmp_path: Path) -> None:
    said: list[str] = []
    source = loaded(tmp_path, {"ema": OTHER, "model": STATE})

    class Says(Silent):
        def note(self, text: str) -> None:
            said.append(text)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, resolve_recipe("w8a8"), tmp_path / "out", observer=Says())
    assert said == list(source.notes)


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
    assert "nor .npy, .npz, .txt" in str(refused(spec, data=tmp_path / "weights.pt"))
