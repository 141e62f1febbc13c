"""What pip is told agrees with itself."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
DEPENDENCIES = PYPROJECT["project"]["dependencies"]


def test_the_requirements_for_cpus_differ_in_the_package_of_onnx_runtime_alone() -> None:
    lines = (ROOT / "requirements-cpu.txt").read_text("utf-8").splitlines()
    required = {line for line in lines if not line.startswith("#")}
    shared = {one for one in DEPENDENCIES if not one.startswith("onnxruntime")}
    (runtime,) = required - shared
    assert runtime.startswith("onnxruntime>=")
    assert shared < required


def test_no_dependency_has_an_upper_bound() -> None:
    assert [one for one in DEPENDENCIES if "<" in one.partition(";")[0]] == []


def test_the_description_on_pypi_has_no_link_into_the_repository() -> None:
    text = setup_file()["without_repository_links"]((ROOT / "README.md").read_text("utf-8"))
    assert re.findall(r"\]\((?!https?:|#)[^)]*\)", text) == []
    assert "outputs (`docs/outputs.md`)" in text


def test_images_of_the_repository_are_left_out_and_links_to_hosts_stay() -> None:
    rewritten = setup_file()["without_repository_links"]
    text = "One.\n\n![a run](docs/images/run.svg)\n\n[here](https://example.org/a) [there](b.md)\n"
    assert rewritten(text) == "One.\n\n[here](https://example.org/a) there (`b.md`)\n"


def test_every_package_of_the_repository_is_in_the_wheel() -> None:
    listed = PYPROJECT["tool"]["setuptools"]
    places = listed["package-dir"]
    folders = {
        places.get(name, name.replace(".", "/").replace("sqakd_fx/passes", "passes"))
        for name in listed["packages"]
    }
    found = {
        file.parent.relative_to(ROOT).as_posix()
        for room in ("sqakd_fx", "passes", "exporters")
        for file in (ROOT / room).rglob("*.py")
    }
    assert found == folders - {"examples/fashion"}


def setup_file() -> dict[str, Any]:
    """The names in setup.py, without a build."""
    return runpy.run_path(str(ROOT / "setup.py"), run_name="read")
