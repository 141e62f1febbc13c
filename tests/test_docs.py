"""README and docs: what they quote exists, what they show runs, and what they say is in short sentences."""

from __future__ import annotations

import importlib
import re
import runpy
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import sqakd_fx
from sqakd_fx.cli.main import COMMANDS
from sqakd_fx.recipe.resolution import resolve_recipe
from sqakd_fx.source.source import load_source

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "examples" / "paper" / "README.md"]
)
HISTORY = {"CHANGELOG.md", "docs/accuracy-notebook.md"}
MOST_WORDS = 40
PAST = r"no longer|preset before|of now\b|[Tt]he last time|since then|[Ii]n the past|used to be|\bwas mended"
"""What tells of an earlier state; the changelog and the notebook may."""
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
GENERATE = runpy.run_path(str(ROOT / "docs" / "_generate.py"), run_name="read")

RUN_BY = {
    "README.md": ["tests/test_docs.py", "tests/test_readme.py", "tests/test_docs.py"],
    "CONTRIBUTING.md": ["tests/test_contributing.py"] * 4,
    "docs/integrations.md": ["tests/integrations/test_integration_docs.py"] * 4,
    "docs/library.md": ["tests/test_readme.py"],
    "docs/runtimes.md": ["tests/test_docs.py"] * 2,
    "docs/targets.md": ["benchmarks/on_executorch.py", "benchmarks/on_litert.py"],
    "docs/trainers.md": ["tests/test_trainers.py"] * 5,
    "docs/tutorial.md": ["tests/test_docs.py"],
}
"""What runs each Python block of a page, in their order."""


def text_of(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(name), re.S | re.M)


def example_with(text: str, name: str) -> str:
    return next(code for code in blocks(name, "python") if text in code)


def run(code: str, names: dict[str, Any]) -> dict[str, Any]:
    exec(compile(code, "page.md", "exec", dont_inherit=True), names)
    return names


def sentences(text: str) -> list[str]:
    """Sentences, items of lists and cells of tables; code stands alone."""
    text = re.sub(r"^```.*?^```|<!--.*?-->|^    (?!\|).*?$", "", text, flags=re.S | re.M)
    cells = [
        cell for row in re.findall(r"^\|.*$", text, re.M) for cell in re.split(r"(?<!\\)\|", row)
    ]
    prose = re.sub(r"^\|.*$", "\n", text, flags=re.M)
    parts = re.split(r"\n\s*\n|\n\s*(?:[-*]|\d+\.) |^#.*$", prose, flags=re.M)
    return cells + [one for part in parts for one in re.split(r"(?<=[.?!])\s+(?=[^a-z])", part)]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "CHANGELOG.md"])
def test_no_sentence_has_more_than_forty_words(name: str) -> None:
    longest = max(sentences(text_of(name)), key=lambda sentence: len(sentence.split()))
    assert len(longest.split()) <= MOST_WORDS or "differs from the model by" in longest, longest


@pytest.mark.parametrize(
    "name", ["README.md", "docs/tutorial.md", "docs/choosing.md", "docs/faq.md"]
)
def test_pages_for_beginners_have_short_sentences(name: str) -> None:
    counts = [len(sentence.split()) for sentence in sentences(text_of(name)) if sentence.strip()]
    assert statistics.median(counts) <= 20


@pytest.mark.parametrize("name", [name for name in NAMES if name not in HISTORY])
def test_pages_tell_no_history(name: str) -> None:
    assert re.findall(PAST, text_of(name)) == []


def test_every_python_block_has_what_runs_it() -> None:
    found = {name: len(blocks(name, "python")) for name in NAMES if name not in HISTORY}
    assert {name: n for name, n in found.items() if n} == {n: len(by) for n, by in RUN_BY.items()}
    for file in {file for by in RUN_BY.values() for file in by}:
        assert (ROOT / file).exists(), file


@pytest.mark.parametrize("name", sorted(GENERATE["PAGES"]))
def test_generated_pages_are_what_the_program_knows(name: str) -> None:
    assert text_of(f"docs/{name}") == GENERATE["PAGES"][name](), "run python docs/_generate.py"


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    listed = set(re.findall(r"^ +- .*: (\S+\.md)$", text_of("mkdocs.yml"), re.M))
    pages = {file.name for file in ROOT.glob("docs/*.md")}
    elsewhere = {"index.md", "architecture.md", "contributing.md", "changelog.md", "paper.md"}
    assert listed == pages | elsewhere


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_to_files_and_headings_that_are_there(name: str) -> None:
    text = re.sub(r"^```.*?^```", "", text_of(name), flags=re.S | re.M)
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)]*))?\)", text):
        page = (ROOT / name).parent / target if target else ROOT / name
        assert page.exists(), target
        if anchor:
            assert anchor in anchors(page.read_text("utf-8")), f"{target}#{anchor}"


def anchors(text: str) -> set[str]:
    """What the headings of a page are called in links."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in headings}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in HISTORY])
def test_commands_that_pages_show_have_the_options_that_they_show(name: str) -> None:
    known = {
        command.__name__: "\n".join(GENERATE["command_lines"](command)) for command in COMMANDS
    }
    for line in re.findall(r"sqakd-fx ([a-z][^`\n#|]*)", text_of(name)):
        command, *words = line.split()
        if command not in known:
            continue
        for option in (word.partition("=")[0].rstrip(".,:;)") for word in words):
            if option.startswith("--") and option != "--help":
                assert f"`{option}" in known[command], f"{command} has no {option}"


def test_the_page_on_python_has_every_public_name_where_it_lives() -> None:
    parts = re.findall(
        r"^::: (\S+)\n    options:\n      heading: \"sqakd_fx\.(\w+)\"",
        text_of("docs/api.md"),
        re.M,
    )
    places = {name: path for path, name in parts if name in sqakd_fx.__all__}
    assert set(places) == set(sqakd_fx.__all__) - {"SqakdError"}
    for name, path in places.items():
        module, _, attribute = path.rpartition(".")
        assert getattr(importlib.import_module(module), attribute) is getattr(sqakd_fx, name)


@pytest.mark.parametrize("name", ["docs/recipes.md", "docs/when-accuracy-drops.md"])
def test_recipes_that_pages_show_are_recipes(name: str, tmp_path: Path) -> None:
    (text,) = blocks(name, "toml")
    (tmp_path / "recipe.toml").write_text(text)
    assert resolve_recipe(tmp_path / "recipe.toml").override


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A network and its images, in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 26 * 26, 10))
    return {"net": net.eval(), "images": torch.randn(32, 1, 28, 28)}


def exported(small: dict[str, Any]) -> None:
    program = sqakd_fx.build_program(small["net"], small["images"], "w4a4")
    sqakd_fx.calibrate(program, small["images"])
    sqakd_fx.export(program, sqakd_fx.lower(program.student).graph_module, "model.onnx")


def test_the_model_file_of_the_tutorial_is_loaded(tmp_path: Path, clean_imports: None) -> None:
    (tmp_path / "model.py").write_text(example_with("def train_data", "docs/tutorial.md"))
    source = load_source(str(tmp_path / "model.py"))
    assert source.train_data is not None
    (images,) = next(iter(source.train_data))
    assert source.model(images).shape == (32, 5)


def test_the_model_file_of_the_readme_holds_what_it_says(tmp_path: Path) -> None:
    from torch.utils.data import DataLoader

    images = TensorDataset(torch.zeros(4, 3, 224, 224))
    labelled = TensorDataset(torch.zeros(4, 3, 224, 224), torch.zeros(4, dtype=torch.int64))
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5))
    names: dict[str, Any] = {
        "torch": torch,
        "DataLoader": DataLoader,
        "Net": lambda: net,
        "load_file": lambda name: net.state_dict(),
        "Images": lambda folder: images,
        "Labelled": lambda folder: labelled,
    }
    run(example_with("def eval_data", "README.md"), names)
    assert names["model"]()(names["example_inputs"]()).shape == (2, 5)
    (batch,) = next(iter(names["train_data"]()))
    inputs, labels = next(iter(names["eval_data"]()))
    assert batch.shape == inputs.shape
    assert 0 <= names["metric"](net(inputs), labels) <= 1


def test_a_run_from_python(small: dict[str, Any]) -> None:
    logits: Tensor = run(example_with("print(result)", "README.md"), small)["logits"]
    assert logits.shape == (8, 10)


def test_a_file_runs_in_onnx_runtime_as_the_page_has_it(small: dict[str, Any]) -> None:
    exported(small)
    outputs = run(example_with("SessionOptions", "docs/runtimes.md"), {})["outputs"]
    assert outputs[0].shape == (4, 10)


def test_a_file_runs_in_openvino_as_the_page_has_it(small: dict[str, Any]) -> None:
    pytest.importorskip("openvino")
    exported(small)
    outputs = run(example_with("import openvino", "docs/runtimes.md"), {})["outputs"]
    assert outputs[0].shape == (4, 10)
