"""A result folder is rebuilt from its own data, and runs no code that it names."""

from __future__ import annotations

import ast
import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from awkward_models import AWKWARD
from common_models import MODELS
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner, Result

import sqakd_fx
from sqakd_fx.cli.main import app
from sqakd_fx.engine.memory_format import store_channels_last
from sqakd_fx.errors import StorageError
from sqakd_fx.ir.outputs import tensors_of
from sqakd_fx.program import Program, build_program, lower
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.quant.quantizer import Quantizer, quantizers_of
from sqakd_fx.recipe.keys import Recipe
from sqakd_fx.results.known_operations import function_of
from sqakd_fx.results.saved_graph import decode_graph, encode_graph, tensors_in
from sqakd_fx.results.saved_modules import decode_module, encode_module
from sqakd_fx.results.saved_values import NotSaved
from sqakd_fx.results.student import _graph_text, _plain, load_saved

ROOT = Path(__file__).parents[2]
PACKAGE = [
    path for room in ("sqakd_fx", "passes", "exporters") for path in (ROOT / room).rglob("*.py")
]
NAMES = ("attention", "functional", "shared", "u-net", "masked", "many inputs")
CASES = {name: MODELS[name][:3] for name in NAMES if name in MODELS}
AWKWARD_NAMES = (
    "changed view", "not only tensors", "sequence first", "cells", "bag", "mixed", "norms",
    "changed after it was read", "spectrogram",
)  # fmt: skip
CASES |= {name: (AWKWARD[name][0], (AWKWARD[name][1],), {}) for name in AWKWARD_NAMES}
ROWS = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))


class Recurrent(nn.Module):
    """Layers that stay modules, one of them without parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.rnn = nn.LSTM(8, 5, bidirectional=True), nn.RNN(10, 4, nonlinearity="relu")
        self.norm = nn.LayerNorm(4, elementwise_affine=False)
        self.end = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.end(self.norm(self.rnn(self.lstm(x)[0])[0]))


CASES["recurrent"] = (Recurrent, (ROWS,), {})


def calibrated(model: nn.Module, args: Any, kwargs: Any, recipe: str | Recipe = "w4a4") -> Program:
    program = build_program(model, args, recipe, example_kwargs=kwargs)
    calibrate(program.student, [program.example], method="minmax")
    program.student.eval()
    return program


def require_same_when_read_back(program: Program) -> None:
    tensors = {name: x.detach().clone() for name, x in tensors_in(program.student).items()}
    made = decode_graph(json.loads(json.dumps(encode_graph(program.student))), tensors)
    with torch.no_grad():
        wanted, given = (tensors_of(one(*program.example)) for one in (program.student, made))
    assert all(torch.equal(x, y) for x, y in zip(wanted, given, strict=True))
    first, second = (lower(one).graph_module for one in (program.student, made))
    assert str(first.graph) == str(second.graph)
    states = first.state_dict(), second.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("name", CASES)
def test_a_student_read_back_gives_the_same_outputs_and_the_same_integer_program(name: str) -> None:
    torch.manual_seed(0)
    model, args, kwargs = CASES[name]
    require_same_when_read_back(calibrated(model(), args, kwargs))


def test_a_live_batch_norm_and_shared_quantizers_are_read_back(residual_net: nn.Module) -> None:
    require_same_when_read_back(calibrated(residual_net, (torch.randn(2, 3, 16, 16),), {}, "w2a2"))


def test_a_graph_of_torch_export_is_read_back(residual_net: nn.Module) -> None:
    recipe = sqakd_fx.resolve_recipe("w4a4", settings=["frontend=export"])
    require_same_when_read_back(calibrated(residual_net, (torch.randn(2, 3, 16, 16),), {}, recipe))


LOOKS_UP = {"import_module", "exec_module", "__import__", "eval", "exec", "load_library"}
ALLOWED = {
    ("source/model_file.py", "import_module"),  # what the user names on the command line
    ("source/model_file.py", "exec_module"),
    ("runtime/openvino.py", "import_module"),  # names that stand in the code
    ("exporters/kept_translations.py", "import_module"),
    ("source/libraries.py", "import_module"),
    ("__init__.py", "import_module"),
}


def test_nothing_is_imported_by_name_but_the_users_model_and_names_in_the_code() -> None:
    found = set()
    for path in PACKAGE:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = node.func if isinstance(node, ast.Call) else None
            own = called.id if isinstance(called, ast.Name) else ""
            of_module = called.attr if isinstance(called, ast.Attribute) else ""
            if own in LOOKS_UP or of_module in LOOKS_UP - {"eval", "exec"}:
                found.add((str(path.relative_to(ROOT)).removeprefix("sqakd_fx/"), own or of_module))
            if of_module == "load" and isinstance(called, ast.Attribute):
                holder, keys = ast.unparse(called.value), {key.arg for key in node.keywords}
                assert holder != "pickle"
                assert holder != "torch" or "weights_only" in keys
                assert holder != "np" or "allow_pickle" in keys
    assert found == ALLOWED


# -- a folder as somebody else may have made it ---------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4)
        self.end = nn.Linear(144, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm(self.conv(x)))
        return self.end(y.reshape(y.shape[0], -1))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "net"
    torch.manual_seed(0)
    images = torch.randn(64, 1, 8, 8)
    sqakd_fx.quantize(
        Net(), images, example_inputs=images[:2], recipe={"steps": 1, "batch_size": 16}, out=out
    )
    return out


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "net")


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that code of a folder would write; the test fails where it is there in the end."""
    path = tmp_path / "ran"
    monkeypatch.setattr("os.abort", lambda: path.write_text("abort"))
    monkeypatch.setattr("os.system", lambda command: path.write_text(command))
    yield path
    assert not path.exists()


def answer(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(one) for one in arguments], env={"COLUMNS": "120"})


COMMANDS = (
    (["validate"], "a file"),
    (["validate"], "os:abort"),
    (["inspect"], "os:abort"),
    (["inspect", "--stage", "lowered"], "a file"),
    (["export"], "os:abort"),
)


@pytest.mark.parametrize(("command", "source"), COMMANDS, ids=str)
def test_a_folder_runs_nothing_that_it_names(
    folder: Path, mark: Path, tmp_path: Path, command: list[str], source: str
) -> None:
    evil = tmp_path / "evil.py"
    evil.write_text(f"open({str(mark)!r}, 'w').close()\n")
    facts = json.loads((folder / "program.json").read_text())
    facts["source"] = str(evil) if source == "a file" else source
    (folder / "program.json").write_text(json.dumps(facts))
    done = answer(command[0], folder, *command[1:])
    assert done.exit_code == 0, done.stderr
    (folder / "graph.json").unlink()
    done = answer(command[0], folder, *command[1:])
    assert done.exit_code == 2
    assert facts["source"] in done.stderr
    assert "--source" in done.stderr


PAYLOADS = (
    "__import__('os').abort()", "x = 1\n    __import__('os').abort()", "a'); __import__('os').abort(); ('",
    'a"); __import__("os").abort(); ("', "os.system", "torch.load", "builtins.eval", "builtins.getattr",
    "ops.aten.from_file.default", "functional.torch", "operator.methodcaller", "__class__", "__reduce__",
)  # fmt: skip


def strings_in(value: Any, change: Callable[[str], Any], seen: list[int], wanted: int) -> Any:
    """`value` with its string number `wanted`, a key or a value, changed."""
    if isinstance(value, str):
        seen[0] += 1
        return change(value) if seen[0] == wanted else value
    if isinstance(value, list):
        return [strings_in(one, change, seen, wanted) for one in value]
    if isinstance(value, dict):
        return {
            strings_in(key, change, seen, wanted): strings_in(one, change, seen, wanted)
            for key, one in value.items()
        }
    return value


def test_no_name_in_a_graph_becomes_code(made: Path, mark: Path) -> None:
    """Every third string of the saved graph in turn is one of many payloads: it is refused, or means nothing."""
    spec = json.loads((made / "graph.json").read_text())
    tensors = load_file(made / "student.safetensors")
    example = load_saved(made).example
    seen = [0]
    strings_in(spec, str, seen, -1)
    for wanted in range(1, seen[0] + 1, 3):
        payload = PAYLOADS[wanted % len(PAYLOADS)]
        changed = strings_in(spec, lambda _: payload, [0], wanted)  # noqa: B023
        with contextlib.suppress(Exception):
            decode_graph(changed, tensors)(*example)
        assert not mark.exists(), (wanted, payload)


@pytest.mark.parametrize(
    "name",
    ["os.system", "torch.load", "torch.save", "builtins.eval", "builtins.open", "builtins.__import__",
     "ops.aten.from_file.default", "ops.prims.iota.default", "functional.torch", "operator.attrgetter",
     "tensor.apply_", "tensor.__class__", "torch.ops", "torch.hub", "builtins.getattr"],
)  # fmt: skip
def test_a_graph_calls_no_function_beside_the_known_operations(name: str) -> None:
    assert function_of(name) is None


def test_a_damaged_folder_is_one_sentence(folder: Path) -> None:
    (folder / "graph.json").write_text('{"nodes": [}')
    with pytest.raises(StorageError, match=r"graph\.json"):
        load_saved(folder)
    (folder / "graph.json").write_text('{"nodes": [], "modules": {}, "tensors": {}, "same": {}}')
    with pytest.raises(StorageError, match="damaged"):
        load_saved(folder)
    (folder / "graph.json").write_text("[" * 100_000)
    with pytest.raises(StorageError, match=r"graph\.json"):
        load_saved(folder)


def test_the_float_profile_and_the_float_graph_ask_for_the_model(folder: Path) -> None:
    for arguments in (
        ["export", folder, "--profile", "float"],
        ["inspect", folder, "--stage", "traced"],
    ):
        done = answer(*arguments)
        assert done.exit_code == 2
        assert "--source" in done.stderr


def test_data_of_the_users_own_validates_without_the_model(folder: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(20, 1, 8, 8)).astype("f4"))
    done = answer("validate", folder, "--data", tmp_path / "x.npy", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["samples"] == 20


class Own(nn.Module):
    """Branches on data: no front end follows it, and it stays whole."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if isinstance(x, torch.Tensor) else x


def test_a_student_with_code_of_the_users_own_says_so() -> None:
    program = calibrated(
        nn.Sequential(nn.Linear(4, 4), Own(), nn.Linear(4, 4)),
        (torch.randn(3, 4),),
        {},
        sqakd_fx.resolve_recipe({"float_modules": ["1"]}),
    )
    with pytest.raises(NotSaved, match="Own"):
        encode_graph(program.student)


def test_a_student_that_was_trained_channels_last_is_compared_as_it_is_read_back() -> None:
    """Sums in another order move codes by a step, and outputs of a deep network by far more."""
    images = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    program = calibrated(nn.Sequential(nn.Conv2d(3, 16, 3)).eval(), (images,), {}, "w8a8")
    store_channels_last(program.student)
    strides: list[tuple[int, ...]] = []

    def note(module: nn.Module, given: Any) -> None:
        strides.append(given[0].stride())

    (weights,) = (q for q in quantizers_of(program.student).values() if q.role == "weight")
    weights.register_forward_pre_hook(note)
    state = {name: _plain(tensor) for name, tensor in tensors_in(program.student).items()}
    assert "missing" not in json.loads(_graph_text(program, state))
    assert strides == [(27, 9, 3, 1)]


def test_a_signed_grid_is_saved_as_one() -> None:
    spec = json.loads(json.dumps(encode_module(Quantizer("lsq", "activation", 8, signed=True), {})))
    made = decode_module(spec, {})
    assert isinstance(made, Quantizer)
    assert made.is_about_zero
