"""Options: what `--help` says, what is refused, what a shell completes."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import get_args

import pytest
import typer
from typer.testing import CliRunner, Result

from sqakd_fx.cli.completion import settings_like
from sqakd_fx.cli.graphs import STAGES
from sqakd_fx.cli.main import COMMANDS, app
from sqakd_fx.cli.options import DeviceName, ProfileName, StageName
from sqakd_fx.cli.recipe_keys import recipe_keys
from sqakd_fx.exporters.profiles import PROFILES
from sqakd_fx.recipe.keys import KNOWN_FAMILIES, Override, Recipe
from sqakd_fx.recipe.presets import preset_names

NAMES = [command.__name__ for command in COMMANDS]


def answer(*arguments: str, columns: int = 200) -> Result:
    return CliRunner().invoke(app, arguments, env={"COLUMNS": str(columns), "TERMINAL_WIDTH": None})


def test_help_and_version_do_not_import_torch(tmp_path: Path) -> None:
    code = "import sys, sqakd_fx.cli.main as m\ntry: m.app(sys.argv[1:])\nfinally: assert 'torch' not in sys.modules"
    for asked, said in (("--help", "quantize"), ("--version", version("sqakd-fx"))):
        command = [sys.executable, "-c", code, asked]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert said in done.stdout


@pytest.mark.parametrize("command", NAMES)
def test_every_option_has_a_help_text_of_several_words(command: str) -> None:
    group = typer.main.get_command(app)
    assert answer(command, "-h").exit_code == 0
    for option in group.commands[command].params:
        assert len((option.help or "").split()) >= 3, option.name


def test_help_has_no_line_that_ends_where_the_source_file_does() -> None:
    for command in COMMANDS:
        for paragraph in inspect.cleandoc(command.__doc__ or "").split("\n\n"):
            assert "\n" not in paragraph, command.__name__


@pytest.mark.parametrize("command", NAMES)
def test_help_shows_brackets_as_they_are_written(command: str) -> None:
    group = typer.main.get_command(app)
    one = group.commands[command]
    texts = [one.help or "", *(option.help or "" for option in one.params)]
    shown = answer(command, "--help").stdout
    for word in re.findall(r"\[\w+\]", " ".join(texts)):
        assert word in shown


def test_options_stand_in_groups() -> None:
    shown = answer("quantize", "--help").stdout
    groups = [
        shown.index(name) for name in ("Model and data", "Bits and recipe", "Training", "Output")
    ]
    assert groups == sorted(groups)


def test_choices_of_options_are_those_of_the_tables() -> None:
    assert get_args(ProfileName) == tuple(PROFILES)
    assert get_args(StageName) == tuple(STAGES)
    device = Recipe.model_json_schema()["properties"]["device"]
    assert list(get_args(DeviceName)) == device["enum"]


@pytest.mark.parametrize(
    ("command", "option", "named"),
    [
        ("quantize", "--target", "'onnxruntime', 'tensorrt', 'openvino'"),
        ("quantize", "--device", "'auto', 'cpu', 'cuda'"),
        ("inspect", "--stage", "'traced', 'folded', 'quantized', 'lowered'"),
        ("inspect", "--format", "'svg'"),
        ("export", "--profile", "'packed'"),
        ("validate", "--runtime", "'openvino'"),
    ],
)
def test_a_wrong_choice_is_one_sentence_that_names_the_choices(
    command: str, option: str, named: str
) -> None:
    done = answer(command, "model.py", option, "wrong")
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1
    assert named in done.stderr
    assert "--help" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["quantise"], "did you mean 'quantize'"),
        (["quantize"], "missing argument 'MODEL'"),
        (["quantize", "m.py", "--recipes"], "--recipe"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(arguments: list[str], said: str) -> None:
    done = answer(*arguments)
    assert done.exit_code == 2
    assert said.lower() in done.stderr.lower()
    assert done.stderr.count("\n") == 1


def test_every_recipe_key_has_its_values_default_and_sentence() -> None:
    keys = {key.name: key for key in recipe_keys()}
    assert set(keys) == {*Recipe.model_fields, *(f"override.{n}" for n in Override.model_fields)}
    for key in keys.values():
        assert len(key.sentence.split()) >= 3, key.name
        assert key.values, key.name
        assert key.default, key.name
    assert keys["weight_bits"].values == "integer from 1 to 8"
    assert keys["batch_norm"].values == "one of absorb, fold"
    assert keys["delta"].default == "absent"
    assert keys["override.match"].default == "required"
    shown = answer("recipes", "--keys").stdout
    assert all(f"{key.name}: " in shown and key.sentence in shown for key in keys.values())


def test_recipes_say_when_each_preset_is_used() -> None:
    lines = answer("recipes").stdout.splitlines()
    for name in preset_names():
        (line,) = (text for text in lines if text.startswith(f"{name} "))
        assert len(line.split()) > 4


def test_settings_are_completed_with_keys_and_their_words() -> None:
    assert "weight_bits=" in [text for text, _ in settings_like("weight_")]
    assert [text for text, _ in settings_like("batch_norm=")] == [
        "batch_norm=absorb",
        "batch_norm=fold",
    ]
    assert [text for text, _ in settings_like("tf32=t")] == ["tf32=true"]
    assert {f"weight_family={name}" for name in KNOWN_FAMILIES} == {
        text for text, _ in settings_like("weight_family=")
    }
    assert settings_like("nothing=") == []


def test_a_shell_completes_options_and_keys(tmp_path: Path) -> None:
    words = "sqakd-fx quantize model.py --set weight_b"
    environment = os.environ | {"_SQAKD_FX_COMPLETE": "complete_bash", "COMP_WORDS": words}
    done = subprocess.run(
        [sys.executable, "-c", "from sqakd_fx.cli.main import app; app(prog_name='sqakd-fx')"],
        env=environment | {"COMP_CWORD": "4"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert "weight_bits=" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["quantize", "m.py", "--data", "x.npy", "--data-free"], "give one of them"),
        (["sensitivity", "m.py", "--data", "x.npy", "--data-free"], "give one of them"),
        (["sensitivity", "m.py", "--out", "mixed.toml"], "give --budget such as size=1.5MB"),
        (["quantize", "m.py", "--data-free", "--mean", "0.5"], "are for images of --data"),
    ],
)
def test_options_that_contradict_or_miss_others_are_refused(
    arguments: list[str], said: str
) -> None:
    done = answer(*arguments)
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.split())


def test_data_free_makes_inputs_and_the_report_says_of_what(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "def model():\n"
        "    torch.manual_seed(0)\n"
        "    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))\n"
        "    net(2 + torch.randn(64, 1, 6, 6))\n"
        "    return net.eval()\n"
    )
    done = answer(
        "quantize", str(tmp_path / "model.py"), "--input-shape", "2,1,6,6", "--data-free",
        "--steps", "1", "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "real ones may fare worse" in done.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["data"]["training"].startswith("512 inputs made of the statistics of 1 BatchNorm")
    assert "make data" in report["seconds"]
    assert "--data-free" in report["command"]
