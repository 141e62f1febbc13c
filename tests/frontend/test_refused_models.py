"""Models that are refused, in one sentence that says what stands in the way and what to do."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch
from awkward_models import Hooked
from common_models import ROWS, compiled
from torch import Tensor, nn
from torch.nn import functional as F

import sqakd_fx
from sqakd_fx import pipeline
from sqakd_fx.errors import ExportError, TraceError
from sqakd_fx.exporters.translation import Translator
from sqakd_fx.frontend.trace import trace
from sqakd_fx.program import build_program
from sqakd_fx.recipe.resolution import resolve_recipe
from sqakd_fx.source.source import load_source

MADE: list[Any] = []


class HoldsOn(nn.Module):
    """A hook that writes to the last model that was made, not to the module that it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 4)
        self.seen: dict[str, Tensor] = {"a": torch.zeros(3, 6)}
        MADE[:] = [self]
        self.a.register_forward_hook(lambda module, inputs, out: MADE[0].seen.update(a=out))

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


class Returns(nn.Module):
    """Gives what `made` makes of its one layer's output."""

    def __init__(self, made: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.a, self.made = nn.Linear(6, 4), made

    def forward(self, x: Tensor) -> Any:
        return self.made(self.a(x))


class Box:
    def __init__(self, x: Tensor) -> None:
        self.x = x


@pytest.mark.parametrize(
    ("made", "what"),
    [
        (lambda y: None, "None and no tensor"),
        (lambda y: "cat", "a str and no tensor"),
        (lambda y: y.sum().item(), "a float and no tensor"),
        (lambda y: y.tolist(), "a list and no tensor"),
        (lambda y: {}, "a dict and no tensor"),
        (lambda y: y.numpy(), "ndarray, inside which"),
        (lambda y: (y, Box(y)), "a Box, inside which no tensor can be followed"),
        (lambda y: (z for z in y), "a generator, inside which"),
        (lambda y: y.to_sparse(), "a sparse_coo tensor, for which ONNX has no form"),
        (lambda y: torch.nested.nested_tensor([y[0], y[1]]), "a nested tensor"),
    ],
    ids=[
        "none",
        "text",
        "number",
        "list",
        "empty",
        "numpy",
        "class",
        "generator",
        "sparse",
        "nested",
    ],
)
def test_an_output_that_no_file_can_give_is_refused_with_the_line(
    made: Callable[[Tensor], Any], what: str
) -> None:
    with pytest.raises(TraceError, match=rf"forward at {__file__}:\d+ returns .*{what}.*: return"):
        build_program(Returns(made), ROWS, "w8a8")


@pytest.mark.parametrize("beside", ["cat", 3, 0.5, None, torch.float32], ids=str)
def test_what_is_no_tensor_may_lie_beside_one(beside: Any) -> None:
    program = build_program(Returns(lambda y: {"y": y, "beside": beside}), ROWS, "w8a8")
    assert program.teacher(ROWS)["beside"] == beside


def stack(*further: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 6), *further)


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return stack()


class Graph(nn.Module):
    """Multiplies by an adjacency matrix."""

    def __init__(self, adjacency: Tensor) -> None:
        super().__init__()
        self.a = nn.Linear(6, 4)
        self.register_buffer("adjacency", adjacency)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(torch.matmul(self.adjacency, x.T).T)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: torch.jit.script(stack()), "the model is TorchScript.*give the Python module"),
        (
            lambda: torch.jit.trace(stack(), ROWS),
            "the model is TorchScript.*give the Python module",
        ),
        (on_meta, "0.weight has no values, .* meta device: call model.to_empty"),
        (lambda: Graph(torch.eye(6).to_sparse()), "adjacency is a sparse_coo tensor.*to_dense"),
        (lambda: Graph(torch.eye(6).to_sparse_csr()), "adjacency is a sparse_csr tensor.*to_dense"),
    ],
    ids=["scripted", "traced", "meta", "sparse", "csr"],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_a_model_without_code_or_dense_values_is_refused_when_it_is_loaded(
    make: Callable[[], nn.Module], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(TraceError, match=sentence):
        build_program(make(), ROWS, "w8a8")
    module = ModuleType("made")
    module.model, module.example_inputs = make, lambda: ROWS  # type: ignore[attr-defined]
    with pytest.raises(TraceError, match=sentence), patch.dict(sys.modules, made=module):
        load_source("made:model")


def test_the_ways_out_of_such_models_work() -> None:
    of_script = stack()
    of_script.load_state_dict(torch.jit.script(stack()).state_dict())
    of_meta = on_meta().to_empty(device="cpu")
    of_meta.load_state_dict(stack().state_dict())
    for model in (of_script, of_meta, Graph(torch.eye(6).to_sparse().to_dense())):
        build_program(model, ROWS, "w8a8")


class Numpy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * float(x.detach().numpy().max())


@pytest.mark.parametrize("specialize", [[], ["1"]], ids=["", "specialized"])
def test_numpy_on_the_data_is_refused_in_a_submodule_too(specialize: list[str]) -> None:
    with pytest.raises(
        TraceError, match=rf"{__file__}:\d+: .*numpy on the data.*torch's functions"
    ):
        trace(stack(Numpy()), ROWS, specialize=specialize)


class Keeps(nn.Module):
    """Keeps its features for whoever looks at them, as tools that draw them do."""

    def __init__(self, last: Any) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.last, self.seen, self.named = last, [], {"a": 0}  # type: ignore[var-annotated]

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        self.last = y if self.last is None else y + self.last
        self.seen.append(y)
        self.named["a"] = y
        self.new = y
        return self.last


def test_what_forward_leaves_in_attributes_is_no_part_of_the_trace() -> None:
    model = Keeps(None)
    with pytest.raises(TraceError, match="differs from the model"):
        trace(model, ROWS)
    kept = (model.last, model.named["a"], model.new, *model.seen)
    assert all(isinstance(x, Tensor) for x in kept)


def test_a_feature_that_is_only_kept_does_not_matter() -> None:
    class OnlyKeeps(Keeps):
        def forward(self, x: Tensor) -> Tensor:
            self.last = None
            return super().forward(x)

    model = OnlyKeeps(None).eval()
    graph = trace(model, ROWS).graph_module
    with torch.no_grad():
        torch.testing.assert_close(graph(ROWS), model(ROWS))


class AsksAttention(nn.Module):
    """Uses what nn.MultiheadAttention has, and what somebody has put on it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.attention.rate = 0.5  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        y = x[:, None]
        mask, _ = self.attention.merge_masks(None, None, y)
        return self.attention(y, y, y, attn_mask=mask)[0][:, 0] * self.attention.rate


def test_attention_that_is_written_out_has_what_the_original_has() -> None:
    model = AsksAttention().eval()
    with torch.no_grad():
        wanted = model(ROWS)
        torch.testing.assert_close(trace(model, ROWS).graph_module(ROWS), wanted)
    with pytest.raises(TraceError, match=rf"{__file__}:\d+"):
        trace(Returns(lambda y: y.no_such_method()), ROWS)


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
    assert not list((tmp_path / "out").rglob("train.jsonl"))
    assert not list((tmp_path / "out").rglob("student.safetensors"))


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
    monkeypatch.setattr(pipeline, "check_export", lambda program: Translator())
    assert tried == exported("not-tried")
