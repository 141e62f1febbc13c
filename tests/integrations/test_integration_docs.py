"""The examples of docs/integrations.md go through the compiler."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from sqakd_fx.program import build_program
from sqakd_fx.source.batches import Loading, input_batches
from sqakd_fx.source.source import Source, load_source

PAGE = (Path(__file__).parent.parent.parent / "docs" / "integrations.md").read_text("utf-8")
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "good",
    "bad",
    "film",
    "it",
    "is",
    "not",
    "very",
]
TEXTS = ["it is a good film", "it is bad", "not very good", "a very bad film"] * 3


def loaded(heading: str, **names: Any) -> tuple[Source, dict[str, Any]]:
    """The source of the example under a heading, and the names that all its code leaves."""
    section = next(p for p in re.split(r"^## ", PAGE, flags=re.M) if p.startswith(heading))
    first, *rest = re.findall(r"^```python\n(.*?)^```", section, re.S | re.M)
    module = ModuleType("example")
    vars(module).update(names)
    exec(compile(first, "model.py", "exec"), vars(module))
    with patch.dict(sys.modules, example=module):
        source = load_source("example:model")
    vars(module)["rest"] = rest
    return source, vars(module)


def compiled(source: Source) -> Any:
    batches = input_batches(source.train_data, source.form, Loading(2))
    next(iter(batches))
    return build_program(
        source.model, source.example_inputs, "w8a8", example_kwargs=source.example_kwargs
    )


def test_the_batches_of_a_tokenizer_are_data(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
    )
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    source, _ = loaded("transformers", FOLDER=tmp_path, TEXTS=TEXTS)
    assert set(source.example_kwargs) >= {"input_ids", "attention_mask"}
    assert not compiled(source).traced.float_modules


def test_an_image_network_is_made_by_name_with_its_own_transforms() -> None:
    pytest.importorskip("timm")
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 255, (64, 80, 3), np.uint8)
    source, _ = loaded(
        "torchvision and timm", PRETRAINED=False, images=lambda: [Image.fromarray(pixels)] * 4
    )
    assert not compiled(source).traced.float_modules


def test_a_detector_is_made_of_parts() -> None:
    pytest.importorskip("torchvision")
    torch.manual_seed(0)
    source, names = loaded(
        "torchvision: detectors", WEIGHTS=None, images=lambda: [torch.rand(3, 90, 120)] * 2
    )
    assert not compiled(source).traced.float_modules
    assert "detectors.with_parts(detector" in names["rest"][0]
