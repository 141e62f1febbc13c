"""Random networks: traced, folded, quantized, lowered, exported and run, they all agree.

A longer search: python benchmarks/random_plans.py 1000 --seed 5000
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from random_networks import RUNS, random_case, wrong_of, wrong_of_other

NETWORKS = 16


@pytest.mark.parametrize("part", range(4))
def test_all_stages_of_a_random_network_agree(part: int) -> None:
    for number in range(part, NETWORKS, 4):
        case = random_case(number)
        assert wrong_of(case) == [], case


@pytest.mark.parametrize(
    ("target", "number"), [("tensorrt", 101), ("tensorrt", 62060), ("openvino", 101)]
)
def test_they_agree_for_another_target_too(target: str, number: int) -> None:
    case = replace(random_case(number), target=target)
    assert wrong_of(case) == [], case


@pytest.mark.parametrize("target", RUNS)
def test_files_in_the_forms_of_other_runtimes_compute_the_same(target: str) -> None:
    case = random_case(102)
    assert wrong_of_other(case, target) == [], case
