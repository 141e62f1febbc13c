"""The example notebooks run from their first cell to their last, and are stored without outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
NOTEBOOKS = sorted((EXAMPLES / "notebooks").glob("*.ipynb"))
SHOWN = {
    "quantize.ipynb": "same class as float on",
    "own_loop.ipynb": "the file computes what was trained",
    "compare_bits.ipynb": "w2a2",
}
"""What a notebook prints where all of it ran."""


def printed(notebook: Any) -> str:
    outputs = [one for cell in notebook.cells for one in cell.get("outputs", ())]
    return "\n".join(one.get("text", "") for one in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_as_it_stands(path: Path, tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat", reason="the notebooks need nbclient and ipykernel")
    nbclient = pytest.importorskip("nbclient", reason="the notebooks need nbclient and ipykernel")
    folder = tmp_path / "notebooks"
    folder.mkdir()
    (tmp_path / "fashion").symlink_to(EXAMPLES / "fashion")
    notebook = nbformat.read(path, as_version=4)
    place = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place).execute()
    assert SHOWN[path.name] in printed(notebook)


def test_notebooks_are_stored_without_outputs() -> None:
    assert {path.name for path in NOTEBOOKS} == set(SHOWN)
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text("utf-8"))["cells"]
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells), path
