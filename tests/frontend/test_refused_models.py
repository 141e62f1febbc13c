"""Models that are refused, in one sentence that says what stands in the way and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from awkward_models import Hooked
from common_models import ROWS, compiled
from torch import Tensor, nn
from torch.nn import functional as F

import sqakd_fx
from sqakd_fx import pipeline
from sqakd_fx.errors import ExportError, TraceError
from sqakd_fx.frontend.trace import trace
from sqakd_fx.program import build_program
from sqakd_fx.recipe import resolve_recipe


class HoldsOn(nn.Module):
    """A hook that writes to the model it was made on, not to the module that it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 4)
        self.seen: dict[str, Tensor] = {"a": torch.zeros(3, 6)}
        self.a.register_forward_hook(lambda module, inputs, out: self.seen.update(a=out.detach()))

    def forward(self, x: Tensor) -> Tensor:
        self.a(x)
        return self.b(torch.relu(self.seen["a"]))


class Noisy(nn.Module):
    """A forward that draws."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + torch.randn_like(x)


class Unrolled(nn.Module):
    """A loop over the samples of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.a(row) for row in x])


class BranchOnData(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x) if x.mean() > -100 else x


def test_a_branch_in_the_models_own_forward_can_be_left_to_the_example() -> None:
    with pytest.raises(TraceError, match=rf"{__file__}:\d+.*specialize = \[''\]"):
        trace(BranchOnData(), ROWS)
    program = build_program(BranchOnData(), ROWS, resolve_recipe("w8a8", specialize=[""]))
    assert any(__file__ in note.node for note in program.notes)


def test_what_torch_export_prints_while_it_gives_up_is_not_shown(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(TraceError):
        trace(BranchOnData(), ROWS)
    assert capfd.readouterr() == ("", "")


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.LazyLinear(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x)


class Script(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if bool(x.sum() > 0):
            return x
        return -x


class Scripted(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 6), torch.jit.script(Script()))


@pytest.mark.parametrize(
    ("make", "x", "sentence"),
    [
        (Lazy, ROWS, "a.weight has no values yet.*call the model once"),
        (Scripted, ROWS, "submodule '1' is TorchScript.*use the Python module"),
        (Hooked, ROWS.to(torch.complex64), "'x' is complex.*view_as_real"),
        (HoldsOn, ROWS, "a hook .* holds on to the model itself: let the hook use the module"),
        (Noisy, ROWS, "differs from the model by .* on chance.*: take that out of forward"),
        (Unrolled, ROWS, "differs from the model in its shapes.*the batch size"),
    ],
)
def test_a_model_that_cannot_be_compiled_is_refused_in_one_sentence(
    make: type[nn.Module], x: Tensor, sentence: str
) -> None:
    with pytest.raises(TraceError, match=sentence):
        build_program(make(), x, resolve_recipe("w8a8"))


class Rippled(nn.Module):
    """Half precision moves its output by more than a wrong model would."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 4)
        self.function = lambda x: torch.sin(500 * x)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.function(self.a(x)))


def test_a_model_in_half_precision_is_not_taken_for_one_whose_functions_hold_on_to_it() -> None:
    torch.manual_seed(0)
    build_program(Rippled().bfloat16(), ROWS.bfloat16(), "w8a8")


class PerSample(nn.Module):
    """As many groups as there are samples."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.a(x)[None]
        return F.conv1d(rows, torch.ones(len(x), 1, 1), groups=len(x))[0]


class Distances(nn.Module):
    """An operation that torch's exporter takes apart, and then has no form for a part."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(self.a(x)[:, None], x[:, None])


@pytest.mark.parametrize("make", [PerSample, Distances])
def test_an_export_that_fails_names_the_line(make: type[nn.Module], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=rf"{__file__}:\d+.*other operations"):
        compiled(make(), (ROWS,), {}, "w8a8", tmp_path)


@pytest.mark.parametrize(
    ("model", "sample"),
    [
        (nn.Linear(6, 4), ROWS[0]),
        (nn.Conv1d(6, 4, 3), torch.randn(6, 9)),
        (nn.Sequential(nn.Conv2d(6, 4, 3), nn.ReLU()), torch.randn(6, 9, 9)),
    ],
    ids=["linear", "conv1d", "conv2d"],
)
def test_a_sample_without_a_batch_axis_is_refused(model: nn.Module, sample: Tensor) -> None:
    with pytest.raises(TraceError, match=r"axis 0 .* batch axis"):
        trace(model, (sample,))


def test_what_cannot_be_exported_is_known_before_training(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"conv1d.*other operations"):
        sqakd_fx.quantize(
            PerSample(), [ROWS], example_inputs=ROWS, recipe="w8a8", out=tmp_path / "out"
        )
    assert not (tmp_path / "out" / "train.jsonl").exists()
    assert not (tmp_path / "out" / "student.safetensors").exists()


def test_trying_the_export_first_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3))

    def exported(folder: str) -> bytes:
        recipe = resolve_recipe("w4a4", steps=3, batch_size=4)
        result = sqakd_fx.quantize(
            model, [ROWS, -ROWS], example_inputs=ROWS, recipe=recipe, out=tmp_path / folder
        )
        assert result is not None
        return result.model_path.read_bytes()

    tried = exported("tried")
    monkeypatch.setattr(pipeline, "check_export", lambda program: None)
    assert tried == exported("not-tried")
