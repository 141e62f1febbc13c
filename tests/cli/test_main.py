"""The command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import EXAMPLE
from onnx import numpy_helper
from typer.testing import CliRunner, Result

from sqakd_fx.cli.main import app

Answer = Callable[..., Result]

GOOD = """
import torch
from torch import nn
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
def example_inputs(): return torch.zeros(2, 1, 8, 8)
def train_data(): return [torch.randn(8, 1, 8, 8) for _ in range(4)]
"""


def sqakd(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "120", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "sqakd_fx", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Answer:
    """A command in an empty folder, without a process of its own: for what only reads or refuses."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, arguments, env={"COLUMNS": "120"})


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result folder of a small model after a few steps."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "model.py").write_text(GOOD)
    source = str(folder / "model.py")
    done = sqakd("quantize", source, "--steps", "2", "--out", "result", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "result"


def test_quantize_leaves_a_complete_result_folder(tmp_path: Path) -> None:
    done = sqakd("quantize", str(EXAMPLE), "--steps", "12", "--out", "result", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "top-1" in done.stdout
    result = tmp_path / "result"
    names = {p.name for p in result.iterdir()}
    assert {
        "model.onnx", "recipe.toml", "report.json", "report.md",
        "student.safetensors", "example.safetensors", "graph.json", "program.json", "train.jsonl", "deploy.py",
    } <= names  # fmt: skip
    assert ("report.html" in names) == (find_spec("plotly") is not None)
    assert not any("tmp" in name for name in names)
    report = json.loads((result / "report.json").read_text())
    assert report["validation"]["passed"]
    assert report["validation"]["fusion"]["float_heavy"] == []
    assert report["accuracy"]["onnx"] > 85


def test_validate_and_export_work_on_the_folder_alone(result: Path, tmp_path: Path) -> None:
    before = (result / "model.onnx").read_bytes()
    exported = sqakd("export", str(result), cwd=tmp_path)
    assert exported.returncode == 0, exported.stderr
    assert (result / "model.onnx").read_bytes() == before
    checked = sqakd("validate", str(result), "--json", cwd=tmp_path)
    assert checked.returncode == 0, checked.stderr
    assert json.loads(checked.stdout)["passed"]


@pytest.mark.parametrize("profile", ["container", "packed"])
def test_validate_exits_with_1_and_names_the_tensor_of_a_wrong_scale(
    result: Path, tmp_path: Path, profile: str
) -> None:
    folder = shutil.copytree(result, tmp_path / "wrong")
    path = folder / f"{profile}.onnx"
    made = sqakd("export", str(folder), "--profile", profile, "--out", str(path), cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    model = onnx.load(path)
    maker = next(n for n in model.graph.node if n.op_type == "QuantizeLinear")
    names = {o for n in model.graph.node for o in n.output if maker.output[0] in (o, *n.input)}
    (tensor,) = (name for name in names if name.endswith("_quantized"))
    (scale,) = (i for i in model.graph.initializer if i.name == maker.input[1])
    wrong = numpy_helper.to_array(scale) * np.float32(1.0001)
    scale.CopyFrom(numpy_helper.from_array(wrong, scale.name))
    onnx.save(model, path)
    checked = sqakd("validate", str(path), cwd=tmp_path)
    assert checked.returncode == 1, checked.stderr
    assert f"{tensor}: the scale in its QuantizeLinear is not what was trained" in checked.stdout


def test_capabilities_say_what_the_runtime_does(answer: Answer) -> None:
    assert "runs on integer kernels" in answer("capabilities").stdout
    told = json.loads(answer("capabilities", "--json").stdout)
    assert told["providers"]["CPUExecutionProvider"]["Conv, INT8 weight"] == "INTEGER"


@pytest.mark.parametrize("form", ["table", "tree", "code", "dot", "json"])
@pytest.mark.parametrize("stage", ["traced", "quantized", "lowered"])
def test_inspect_shows_every_stage_in_every_format(
    tmp_path: Path, answer: Answer, form: str, stage: str
) -> None:
    (tmp_path / "model.py").write_text(GOOD)
    done = answer("inspect", "model.py", "--stage", stage, "--format", form)
    assert done.exit_code == 0, done.stderr
    assert "relu" in done.stdout.lower() or stage == "lowered"
    if form == "json":
        assert json.loads(done.stdout)["nodes"]


def test_inspect_explains_a_layer_a_tensor_and_an_unknown_name(
    tmp_path: Path, answer: Answer
) -> None:
    (tmp_path / "model.py").write_text(GOOD)
    layer = answer("inspect", "model.py", "--explain", "0", "--bits", "w4a4").stdout
    assert "first_last: the first layer has 8 bits" in layer
    assert "QLinearConv" in layer
    tensor = answer("inspect", "model.py", "--explain", "1")
    assert "quantized by" in tensor.stdout, tensor.stderr
    unknown = answer("inspect", "model.py", "--explain", "x.output_quantizer")
    assert unknown.exit_code == 2
    assert "did you mean" in unknown.stderr


def test_every_name_in_the_onnx_file_can_be_explained(result: Path, answer: Answer) -> None:
    graph = onnx.load(result / "model.onnx").graph
    names = [n.name for n in graph.node] + [n.name for n in graph.initializer]
    names += [output for node in graph.node for output in node.output]
    own = [name for name in names if name[0] in "0123" or "quantized" in name]
    assert len(own) > 10
    for name in own:
        told = answer("inspect", str(result), "--explain", name)
        assert told.exit_code == 0, told.stderr
    assert "conv2d" in answer("inspect", str(result), "--explain", "0/Conv").stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--after", "fold_batchnorm"], "did you mean fold_batch_norm"),
        (["--after", "canonicalize", "--explain", "0"], "--after and --explain"),
        (["--after", "canonicalize", "--diff", "traced", "lowered"], "--after and --diff"),
        (["--after", "canonicalize", "--stage", "lowered"], "--after and --stage"),
        (["--diff", "traced", "canonicalise"], "did you mean canonicalize"),
    ],
)
def test_inspect_refuses_unknown_passes_and_two_places_at_once(
    answer: Answer, options: list[str], said: str
) -> None:
    done = answer("inspect", "model.py", *options)
    assert done.exit_code == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_passes_are_listed_in_order_with_a_sentence_each(answer: Answer) -> None:
    listed = json.loads(answer("passes", "--json").stdout)
    assert [one["name"] for one in listed][:2] == ["functionalize", "fold_constants"]
    assert listed[-1]["name"] == "lower_to_integer"
    assert {"name", "does", "options"} == set(listed[0])
    table = answer("passes").stdout
    assert all(one["name"] in table for one in listed)


def test_inspect_compares_two_stages(tmp_path: Path, answer: Answer) -> None:
    (tmp_path / "model.py").write_text(GOOD)
    done = answer("inspect", "model.py", "--diff", "traced", "quantized")
    assert "+++ quantized" in done.stdout
    assert "quantizer" in done.stdout


def test_inspect_draws_svg_or_says_what_is_missing(tmp_path: Path, answer: Answer) -> None:
    (tmp_path / "model.py").write_text(GOOD)
    done = answer("inspect", "model.py", "--format", "svg")
    assert "<svg" in done.stdout or (done.exit_code == 2 and "graphviz" in done.stderr)


def test_sensitivity_writes_a_recipe_that_quantize_takes(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(
        GOOD.replace("nn.Linear(144, 3)", "nn.Linear(144, 8), nn.Linear(8, 3)")
    )
    found = sqakd("sensitivity", "model.py", "--budget", "bits=3", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert "mean weight bits" in found.stdout
    done = sqakd("quantize", "model.py", "--recipe", "mixed.toml", "--steps", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_recipes_and_doctor_answer(answer: Answer) -> None:
    assert "paper/ewgs-w2a2" in answer("recipes").stdout
    assert "weight_bits = 2" in answer("recipes", "w2a2").stdout
    assert "torch" in answer("doctor").stdout


BAD = {
    "no file": (None, ["quantize", "nothing.py"], "nothing.py"),
    "syntax error": ("def model(:\n", ["quantize", "model.py"], "model.py:1"),
    "no model()": ("x = 1\n", ["quantize", "model.py"], "model()"),
    "model() raises": ("def model():\n    return 1 / 0\n", ["quantize", "model.py"], "model.py:2"),
    "wrong shape": (GOOD, ["quantize", "model.py", "--input-shape", "1,3,8,8"], "shape"),
    "empty data": (GOOD.replace("range(4)", "range(0)"), ["quantize", "model.py"], "empty"),
    "NaN in data": (
        GOOD.replace("torch.randn(8, 1, 8, 8)", "torch.full((8, 1, 8, 8), float('nan'))"),
        ["quantize", "model.py"],
        "NaN",
    ),
    "unknown preset": (GOOD, ["quantize", "model.py", "--recipe", "w4b4"], "w4a4"),
    "unknown key": (GOOD, ["quantize", "model.py", "--set", "weight_bit=4"], "weight_bits"),
    "bad bits": (GOOD, ["quantize", "model.py", "--bits", "w9a9"], "1 to 8"),
    "no weights": (GOOD, ["quantize", "model.py", "--weights", "w.safetensors"], "w.safetensors"),
    "foreign folder": (GOOD, ["quantize", "model.py", "--out", "."], "not made by sqakd-fx"),
    "no GPU": (GOOD, ["quantize", "model.py", "--device", "cuda"], "GPU"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_exit_status_2(
    tmp_path: Path, answer: Answer, case: str
) -> None:
    text, arguments, telling = BAD[case]
    if case == "no GPU":
        torch = pytest.importorskip("torch")
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
    if text is not None:
        (tmp_path / "model.py").write_text(text)
    before = {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    done = answer(*arguments)
    assert done.exit_code == 2, done.stderr
    assert telling in done.stderr
    assert "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("sqakd-fx:")]) == 1
    assert all(p.read_bytes() == content for p, content in before.items())
    assert not list(tmp_path.rglob("*.onnx"))


FAMILY = (
    GOOD
    + """
from sqakd_fx.quant.families import FAMILIES, Family, register
register(Family("mine", FAMILIES["lsq"].weight, FAMILIES["pact"].activation, "here"))
"""
)


def test_a_recipe_may_name_a_family_that_the_model_file_registers(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(FAMILY)
    families = ("--set", "weight_family=mine", "--set", "activation_family=mine")
    done = sqakd("quantize", "model.py", *families, "--steps", "2", "--out", "r", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'weight_family = "mine"' in (tmp_path / "r" / "recipe.toml").read_text()
    refused = sqakd("validate", "r", cwd=tmp_path)
    assert refused.returncode == 2
    assert "'mine'" in refused.stderr
    again = sqakd("validate", "r", "--source", "model.py", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    shown = sqakd("inspect", "model.py", *families, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr


def test_a_family_that_the_model_file_does_not_register_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(GOOD)
    done = sqakd("quantize", "model.py", "--set", "weight_family=mine", cwd=tmp_path)
    assert done.returncode == 2
    assert "weight_family = 'mine' does not fit: choose one of minmax" in done.stderr
    assert "Traceback" not in done.stderr


def test_export_for_a_target_writes_its_file_or_says_what_to_train(
    result: Path, answer: Answer
) -> None:
    assert answer("export", str(result), "--target", "openvino").exit_code == 0
    assert (result / "model.openvino.onnx").exists()
    files = {
        "executorch": "model.executorch.pt2",
        "litert": "model.litert.pt2",
        "qonnx": "model.qonnx.onnx",
    }
    for target, file in files.items():
        assert answer("export", str(result), "--target", target).exit_code == 0
        assert (result / file).exists()
    refused = answer("export", str(result), "--target", "tensorrt")
    assert refused.exit_code == 2
    assert "train with --target tensorrt" in refused.output
    assert not (result / "model.tensorrt.onnx").exists()
    both = answer("export", str(result), "--target", "openvino", "--profile", "packed")
    assert "give one of them" in both.output
