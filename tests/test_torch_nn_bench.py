"""Modules and functions of torch.nn: all are known to the bench, and a sample of them goes through."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from torch_nn import failures, outcome
from torch_nn_cases import LEFT_OUT, Case, all_cases, public_names

CASES = {case.text: case for case in all_cases()}


def test_every_public_name_is_tried_or_left_out_for_a_reason() -> None:
    tried = {case.name for case in CASES.values()}
    assert set(public_names()) <= tried | set(LEFT_OUT)
    assert not tried & set(LEFT_OUT)


def named(*texts: str) -> list[Case]:
    return [CASES[text] for text in texts]


SAMPLES = {
    "pools with windows of several sizes": named(
        "AdaptiveMaxPool2d((4, None))",
        "AdaptiveMaxPool2d((3, 5), return_indices=True)",
        "adaptive_max_pool2d(x, 1, True)",
        "AdaptiveAvgPool2d(4)",
    ),
    "pools of volumes": named(
        "AdaptiveAvgPool3d(2)", "AdaptiveMaxPool3d(4)", "adaptive_max_pool3d_with_indices(x, 1)"
    ),
    "bags of embeddings": [case for text, case in CASES.items() if text.startswith("EmbeddingBag")],
}


@pytest.mark.parametrize("sample", SAMPLES)
def test_calls_are_exact_from_trace_to_onnx_runtime(sample: str) -> None:
    assert failures(SAMPLES[sample]) == []


@pytest.mark.parametrize(
    ("text", "way_out"),
    [
        ("BatchNorm1d(6, track_running_stats=False)", "track_running_stats=True"),
        ("batch_norm(x, None, None, training=True)", "GroupNorm"),
        ("CrossMapLRN2d(3)", "LocalResponseNorm"),
        ("LSTM(10, 6, batch_first=True, proj_size=3)", "LSTMCell"),
        ("FractionalMaxPool2d(2, output_size=4)", "chance"),
    ],
)
def test_what_no_file_can_compute_is_refused_by_name(text: str, way_out: str) -> None:
    found = outcome(CASES[text])
    assert found.result == "refused"
    assert way_out in found.reason
