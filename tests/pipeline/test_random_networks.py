"""Random networks: traced, folded, quantized, lowered, exported and run, they all agree.

A longer search: python tests/random_networks.py 1000 --seed 5000
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from random_networks import random_case, wrong_of

NETWORKS = 16


@pytest.mark.parametrize("part", range(4))
def test_all_stages_of_a_random_network_agree(part: int) -> None:
    for number in range(part, NETWORKS, 4):
        case = random_case(number)
        assert wrong_of(case) == [], case


@pytest.mark.parametrize("target", ["tensorrt", "openvino"])
def test_they_agree_for_another_target_too(target: str) -> None:
    case = replace(random_case(101), target=target)
    assert wrong_of(case) == [], case
