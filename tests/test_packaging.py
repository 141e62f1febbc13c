"""What pip is told agrees with itself."""

from __future__ import annotations

import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
DEPENDENCIES = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"][
    "dependencies"
]


def test_the_requirements_for_cpus_differ_in_the_package_of_onnx_runtime_alone() -> None:
    lines = (ROOT / "requirements-cpu.txt").read_text("utf-8").splitlines()
    required = {line for line in lines if not line.startswith("#")}
    shared = {one for one in DEPENDENCIES if not one.startswith("onnxruntime")}
    (runtime,) = required - shared
    assert runtime.startswith("onnxruntime>=")
    assert shared < required


def test_no_dependency_has_an_upper_bound() -> None:
    assert [one for one in DEPENDENCIES if "<" in one.partition(";")[0]] == []
