"""A report as a run writes it, with the figures of a small classifier."""

from __future__ import annotations

from typing import Any

LAYER = {
    "name": "layers.0",
    "operation": "conv2d",
    "weight_bits": 8,
    "activation_bits": 8,
    "weight_family": "lsq",
    "parameters": 100_000,
    "source": "recipe w8a8",
}
OUTPUT = {
    "name": "output",
    "nature": "class scores",
    "samples": 500,
    "agreement": 0.984,
    "cosine": 0.999,
    "relative_error": 0.021,
    "noise_ratio": 33.5,
}
REPORT: dict[str, Any] = {
    "name": "net",
    "recipe": "w8a8",
    "bits": "w8a8",
    "profile": "container",
    "metric": "top-1",
    "accuracy": {"float": 93.2, "student": 93.3, "onnx": 93.3},
    "outputs": [OUTPUT],
    "float_onnx_bytes": 450_000,
    "onnx_bytes": 130_000,
    "float_ms": 0.5,
    "integer_ms": 0.25,
    "batch": 2,
    "processor": "a processor, 2 cores",
    "layers": [LAYER, LAYER | {"name": "head", "source": "first_last: the last layer has 8 bits"}],
    "source": "model.py",
    "date": "2026-01-02T03:04+00:00",
    "data": {
        "training": "Images of 8000 samples",
        "batches": 62,
        "batch_size": 128,
        "evaluation": None,
    },
    "steps": 64,
    "seed": 0,
    "target": "onnxruntime",
    "summary": [("top-1 (%)", "93.20", "93.30 (ONNX)"), ("ONNX file", "439 KiB", "127 KiB")],
    "stays_in_float": [],
    "training_notes": [],
    "slower_than_float": None,
    "validation": {"samples": 500, "failures": []},
    "validation_lines": [],
}
