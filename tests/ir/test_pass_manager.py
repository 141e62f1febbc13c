"""What a pass is, which passes there are, and what becomes of a faulty one."""

from __future__ import annotations

import importlib
import operator
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import sqakd_fx.passes
from sqakd_fx.errors import PassError
from sqakd_fx.frontend.trace import trace
from sqakd_fx.ir.pass_manager import Pass, PassResult, dump_into, run_passes
from sqakd_fx.program import all_passes, build_program, lower
from sqakd_fx.quant.calibration import calibrate
from sqakd_fx.recipe.resolution import resolve_recipe


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))


@dataclass(frozen=True)
class Faulty(Pass):
    """A pass with a bug: it fails, or leaves a graph that does not run or gives something else."""

    rewrite: Callable[[fx.GraphModule], None]
    name = "faulty"

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        self.rewrite(graph_module)
        return PassResult(graph_module, changed=True)


def raises_key_error(graph_module: fx.GraphModule) -> None:
    graph_module.graph.find_nodes(op="placeholder")[0].meta["not there"]


def erases_a_node_in_use(graph_module: fx.GraphModule) -> None:
    graph_module.graph.erase_node(graph_module.graph.find_nodes(op="call_module")[0])


def picks_out_of_range(graph_module: fx.GraphModule) -> None:
    (result,) = graph_module.graph.output_node().all_input_nodes
    with graph_module.graph.inserting_after(result):
        last = graph_module.graph.call_function(operator.getitem, (result, 1000))
    graph_module.graph.output_node().replace_input_with(result, last)


def doubles_the_output(graph_module: fx.GraphModule) -> None:
    (result,) = graph_module.graph.output_node().all_input_nodes
    with graph_module.graph.inserting_after(result):
        twice = graph_module.graph.call_function(operator.mul, (result, 2))
    graph_module.graph.output_node().replace_input_with(result, twice)


@pytest.mark.parametrize(
    ("rewrite", "said"),
    [
        (raises_key_error, r"^pass faulty cannot rewrite the model \(KeyError: 'not there'\)"),
        (erases_a_node_in_use, r"^pass faulty cannot rewrite the model \(RuntimeError: Tried to"),
        (picks_out_of_range, r"^the model does not run after pass faulty \(IndexError: index"),
        (doubles_the_output, r"^pass faulty changes what the model computes by \d"),
    ],
)
def test_a_faulty_pass_is_told_by_name(
    rewrite: Callable[[fx.GraphModule], None], said: str, images: Tensor
) -> None:
    graph_module = trace(Small().eval(), images).graph_module
    with pytest.raises(PassError, match=said + ".*: try --set frontend=export"):
        run_passes(graph_module, [Faulty(rewrite)], probe=lambda graph: graph(images))


def defined_passes() -> set[type[Pass]]:
    """Every subclass of Pass that a module of sqakd_fx.passes defines."""
    modules = [
        importlib.import_module(found.name)
        for found in pkgutil.walk_packages(sqakd_fx.passes.__path__, "sqakd_fx.passes.")
    ]
    return {
        one
        for module in modules
        for one in vars(module).values()
        if isinstance(one, type) and issubclass(one, Pass) and one is not Pass
    }


def test_every_pass_runs_in_the_pipeline_under_its_own_name() -> None:
    assert set(all_passes().values()) == defined_passes()


@pytest.mark.parametrize("one", all_passes().values(), ids=lambda one: one.name)
def test_a_pass_says_in_one_sentence_what_it_does(one: type[Pass]) -> None:
    assert is_dataclass(one)
    assert "name" not in one.options()
    sentence = one.sentence()
    assert sentence[0].isupper()
    assert sentence.endswith(".")
    assert not sentence.startswith(f"{one.__name__}(")  # what dataclasses write where there is none


def test_a_dump_has_one_numbered_graph_a_pass(images: Tensor, tmp_path: Path) -> None:
    after = dump_into(tmp_path)
    program = build_program(Small(), images, resolve_recipe("w4a4"), after=after)
    calibrate(program.student, [(images,)])
    lower(program.student, after=after)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "00-functionalize.txt",
        "01-fold_constants.txt",
        "02-decompose.txt",
        "03-propagate_shapes.txt",
        "04-canonicalize.txt",
        "05-name_activations.txt",
        "06-propagate_shapes.txt",
        "07-fold_channel_constants.txt",
        "08-fold_scalars.txt",
        "09-drop_key_bias.txt",
        "10-stable_top_k.txt",
        "11-fold_batch_norm.txt",
        "12-insert_quantizers.txt",
        "13-lower_to_integer.txt",
    ]
    assert "sqakd_fx.linear" in (tmp_path / "13-lower_to_integer.txt").read_text(encoding="utf-8")


class Amplifying(nn.Module):
    """A sum in which two large numbers cancel: float32 keeps few digits of what is left."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return ((self.fc(x) + 1e6) - 1e6) * 10


def rounds_otherwise(graph_module: fx.GraphModule) -> None:
    with torch.no_grad():
        graph_module.get_submodule("fc").bias.add_(0.01)  # type: ignore[operator, union-attr]


def test_a_change_no_larger_than_rounding_is_noted_and_no_fault() -> None:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    graph_module = trace(Amplifying().eval(), x).graph_module

    def probe(graph: Callable[..., Tensor]) -> Tensor:
        return graph(x.clone())

    (entry,) = run_passes(graph_module, [Faulty(rounds_otherwise)], probe=probe).log
    assert entry.difference is not None
    assert entry.difference > 1e-3
    (note,) = entry.notes
    assert "float32 and float64 give outputs that differ by" in note.reason
    with pytest.raises(PassError, match="pass faulty changes what the model computes by"):
        run_passes(graph_module, [Faulty(doubles_the_output)], probe=probe)
