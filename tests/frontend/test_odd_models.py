"""Forwards that change their inputs, hooks that hold on to the model, and what is refused by its own name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from common_models import ROWS
from torch import Tensor, nn

import sqakd_fx
from sqakd_fx.errors import ExportError, RecipeError, SqakdError, TraceError
from sqakd_fx.program import build_program


class Applies(nn.Module):
    """A function of its own between two layers; what it is given beside the values is the model."""

    def __init__(self, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.function = nn.Linear(6, 6), nn.Linear(6, 4), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def in_place(model: Applies, x: Tensor) -> Tensor:
    x.mul_(2).add_(1)
    return model.b(torch.relu(model.a(x)))


def test_a_forward_that_changes_its_input_is_compiled_and_the_input_is_not_changed() -> None:
    x = ROWS.clone()
    program = build_program(Applies(in_place), x, "w8a8")
    assert torch.equal(x, ROWS)
    with torch.no_grad():
        torch.testing.assert_close(program.teacher(ROWS.clone()), program.student(ROWS.clone()))


class Hooked(nn.Module):
    """Reads what a hook, which holds on to the model, has kept."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 4)
        self.seen: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: Any, out: Tensor, *, scale: float = 2.0) -> None:
                self.seen[name] = out * scale

            return hook

        self.a.register_forward_hook(keep("a"))
        self.twice = lambda x: self.b(x) + self.b(-x)

    def forward(self, x: Tensor) -> Tensor:
        self.a(x)
        return self.twice(torch.relu(self.seen["a"]))


def test_hooks_and_functions_that_hold_on_to_the_model_follow_its_copy() -> None:
    torch.manual_seed(0)
    model = Hooked().eval()
    program = build_program(model, ROWS, "w8a8")
    with torch.no_grad():
        torch.testing.assert_close(program.teacher(ROWS), model(ROWS))
    assert {"a.weight_folded", "b.weight"} <= dict(program.teacher.named_parameters()).keys()


def double(model: Applies, x: Tensor) -> Tensor:
    return model.b((model.a(x).double() ** 2).float())


def test_what_is_computed_in_float64_is_not_quantized(tmp_path: Path) -> None:
    recipe = {"preset": "w8a8", "steps": 0}
    made = sqakd_fx.quantize(
        Applies(double), ROWS, example_inputs=ROWS[:2], recipe=recipe, out=tmp_path
    )
    assert made is not None
    assert not made.validation.failures


def gradient(model: Applies, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(model.a(x).sum(), x, create_graph=True)[0]


def vmapped(model: Applies, x: Tensor) -> Tensor:
    return torch.vmap(model.b)(model.a(x))


def nested(model: Applies, x: Tensor) -> Tensor:
    y = model.a(x)
    return model.b(torch.nested.nested_tensor([y[:1], y[:2]]).to_padded_tensor(0.0).sum(1))


def chosen(model: Applies, x: Tensor) -> Tensor:
    y = model.a(x)
    return torch.cond(y.sum() > 0, lambda y: model.b(y), lambda y: -model.b(y), (y,))


def reshaped(model: Applies, x: Tensor) -> Tensor:
    try:
        return model.a(x).reshape(7, -1)
    except RuntimeError:
        return model.a(x)


REFUSED: dict[str, tuple[Callable[[Any, Tensor], Any], type[SqakdError], str]] = {
    "gradient": (gradient, TraceError, "takes a gradient in forward, which no file computes"),
    # torch 2.8 looks into what vmap is given and ends before the graph is there
    "vmap": (
        vmapped,
        TraceError,
        r":\d+ calls a function of torch.func.*: write it with a batch|cannot be traced at .*:\d+: vmap",
    ),
    "nested": (nested, TraceError, "makes nested tensors.*: pad to one length"),
    "branch": (chosen, TraceError, r"torch.cond at .*:\d+ chooses a branch.*: compute both"),
    "reshaped": (reshaped, TraceError, r"on the example inputs \(shape '\[7, -1\]' is invalid"),
    "sum": (lambda m, x: m.a(x).sum(), TraceError, "returns one number for the whole batch"),
    "classes": (lambda m, x: m.a(x).argmax(1), RecipeError, "returns int64 tensors.*the scores"),
    "complex": (
        lambda m, x: torch.fft.fft(m.a(x)),
        RecipeError,
        "returns complex numbers.*view_as_real",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_is_refused_for_what_it_does(name: str, tmp_path: Path) -> None:
    function, kind, sentence = REFUSED[name]
    with pytest.raises(kind, match=sentence):
        sqakd_fx.quantize(
            Applies(function), ROWS, example_inputs=ROWS[:2], recipe="w8a8", out=tmp_path
        )


def multiplied(model: Applies, x: Tensor) -> Tensor:
    return model.b(torch.sparse.mm(torch.eye(6).to_sparse(), model.a(x).T).T)


@pytest.mark.parametrize(("function", "sentence"), [(multiplied, "has no ONNX form; write it")])
def test_an_operation_without_a_form_is_named(
    function: Callable[[Any, Tensor], Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=sentence):
        sqakd_fx.quantize(
            Applies(function), ROWS, example_inputs=ROWS[:2], recipe="w8a8", out=tmp_path
        )


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (functools.partial(nn.Linear(6, 4)), "the model is a partial, not an nn.Module"),
        (nn.Linear(6, 4).state_dict(), "the model is an OrderedDict, not an nn.Module"),
        (torch.relu, "not an nn.Module: give the module itself"),
    ],
    ids=["partial", "weights", "function"],
)
def test_what_is_no_module_is_refused(model: Any, sentence: str) -> None:
    with pytest.raises(TraceError, match=sentence):
        build_program(model, ROWS, "w8a8")


def test_a_model_that_is_quantized_already_is_refused() -> None:
    made = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(6, 4)), {nn.Linear})
    with pytest.raises(TraceError, match=r"quantized already: it holds a Linear of .*: give the"):
        build_program(made, ROWS, "w8a8")
