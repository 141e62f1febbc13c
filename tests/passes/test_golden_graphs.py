"""The graphs of known networks at every stage are what they were: a refactoring that changes none proves it."""

from __future__ import annotations

import itertools
import json

import pytest
from golden_graphs import HASHES, NETWORKS, hashes, stages

from sqakd_fx.program import all_passes

KNOWN: dict[str, dict[str, str]] = json.loads(HASHES.read_text(encoding="utf-8"))

CHANGE_VALUES_ALONE = {
    "cross_layer_equalization",
    "smooth_activations",
    "compensate_rounding",
    "correct_bias",
}
"""The passes that leave the printed graph as it is: their own tests see that values move."""


@pytest.mark.parametrize("name", NETWORKS)
def test_the_graphs_of_a_network_are_what_they_were(name: str) -> None:
    graphs = stages(name)
    got, wanted = hashes(graphs), KNOWN[name]
    assert list(got) == list(wanted), "the passes have other names or another order"
    first = next((stage for stage in got if got[stage] != wanted[stage]), None)
    if first is not None:
        pytest.fail(
            f"{name}: the graph differs first at the stage {first}, where it is\n\n{graphs[first]}\n"
            "Compare `PYTHONPATH=tests python tests/passes/golden_graphs.py --print FOLDER` of two checkouts; "
            "where the change is intended, run it with --rewrite.",
            pytrace=False,
        )


def test_each_pass_changes_a_graph() -> None:
    changed = set()
    for known in KNOWN.values():
        in_order = list(known.items())
        for (_, before), (stage, after) in itertools.pairwise(in_order):
            changed |= {stage} if before != after else set()
    assert set(all_passes()) - CHANGE_VALUES_ALONE == changed & set(all_passes())
