"""The figures of a report in words."""

from __future__ import annotations

import pytest
from reports import OUTPUT, REPORT

from sqakd_fx.results.figures import (
    accuracy_lines,
    file_size,
    lost_accuracy,
    packed_estimate,
    speed,
)

VALUES = OUTPUT | {"agreement": None}


def test_size_and_speed_are_beside_those_of_the_float_model() -> None:
    assert file_size(REPORT) == "127 KiB, 3.5 times smaller than float (439 KiB)"
    assert "no smaller than float" in file_size(REPORT | {"onnx_bytes": 500_000})
    assert file_size(REPORT | {"float_onnx_bytes": None}) == "127 KiB"
    assert file_size(REPORT | {"float_onnx_bytes": 90 << 20, "onnx_bytes": 25 << 20}).startswith(
        "25.0 MiB"
    )
    assert "2.0 times as fast as float (0.5 ms)" in speed(REPORT)
    assert "slower than float" in speed(REPORT | {"integer_ms": 1.0})
    for near in (0.49, 0.51):
        assert "; as fast as float (0.5 ms)" in speed(REPORT | {"integer_ms": near})
    assert "float" not in speed(REPORT | {"float_ms": None})


def test_accuracy_is_on_labels_where_there_are_some_and_beside_float_everywhere() -> None:
    assert accuracy_lines(REPORT) == [
        "top-1 93.30 %, float 93.20 %",
        "same prediction as float on 98.4% of 500 samples",
    ]
    values = OUTPUT | {"name": "boxes", "agreement": None}
    several = accuracy_lines(REPORT | {"accuracy": None, "outputs": [OUTPUT, values]})
    assert several[1] == "boxes: relative error 2.10% beside float, on 500 samples"


@pytest.mark.parametrize(
    ("changes", "lost"),
    [
        ({}, False),
        ({"accuracy": {"float": 93.2, "student": 92.0, "onnx": 92.0}}, True),
        ({"accuracy": None}, False),
        ({"accuracy": None, "outputs": [OUTPUT | {"agreement": 0.9}]}, True),
        ({"accuracy": None, "outputs": [VALUES]}, False),
        ({"accuracy": None, "outputs": [OUTPUT, VALUES | {"relative_error": 0.2}]}, True),
    ],
)
def test_a_loss_that_matters_is_told(changes: dict[str, object], lost: bool) -> None:
    assert lost_accuracy(REPORT | changes) is lost


def test_what_four_bits_would_give_counts_the_inner_layers_alone() -> None:
    assert packed_estimate(REPORT, bits=4) == 130_000 - 50_000 - 2 * 2560
    assert packed_estimate(REPORT | {"profile": "packed"}, bits=4) is None
    assert packed_estimate(REPORT | {"layers": []}, bits=4) is None
