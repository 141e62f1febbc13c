"""Sentences of a file as data."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from model_files import refused, write

from sqakd_fx.source.arrays import read_data
from sqakd_fx.source.batches import Loading, input_batches
from sqakd_fx.source.source import load_source

pytestmark = pytest.mark.usefixtures("clean_imports")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "bad", "film", "it", "is"]
SENTENCES = ["it is a good film", "", "  a bad film ", "good"]
CLASSIFIER = """
import torch
from torch import nn

class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.end = nn.Embedding(11, 8), nn.Linear(8, 2)

    def forward(self, {names}):
        return self.end((self.words({ids}) * {mask}).mean(1))

def model():
    return Classifier()
"""
OF_TWO = CLASSIFIER.format(
    names="input_ids, attention_mask", ids="input_ids", mask="attention_mask[..., None]"
)
OF_ONE = CLASSIFIER.format(names="tokens", ids="tokens", mask="1")


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "words")
    return str(tmp_path / "words")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "data.txt").write_text("\n".join(SENTENCES))
    return tmp_path / "data.txt"


def test_sentences_become_inputs_of_one_length(text: Path, tokenizer: str) -> None:
    data: Any = read_data(text, None, tokenizer=tokenizer)
    assert len(data) == 3
    assert {name: len(value) for name, value in data[0].items()} == {
        "input_ids": 7, "token_type_ids": 7, "attention_mask": 7,
    }  # fmt: skip
    assert data[1]["input_ids"].tolist() == [2, 5, 7, 8, 3, 0, 0]
    assert data[1]["attention_mask"].tolist() == [1, 1, 1, 1, 1, 0, 0]


def test_the_models_own_length_is_kept_and_a_note_says_what_is_cut(
    text: Path, tokenizer: str
) -> None:
    data: Any = read_data(text, (2, 5), tokenizer=tokenizer)
    assert data[0]["input_ids"].tolist() == [2, 9, 10, 5, 3]
    assert "become 5 tokens each" in data.note()
    assert "(33%)" in data.note()


@pytest.mark.parametrize(
    ("model", "names"), [(OF_TWO, {"input_ids", "attention_mask"}), (OF_ONE, {"tokens"})]
)
def test_a_model_without_an_example_takes_what_it_names(
    model: str, names: set[str], text: Path, tokenizer: str, tmp_path: Path
) -> None:
    source = load_source(write(tmp_path, model), data=text, tokenizer=tokenizer)
    assert set(source.example_kwargs) == names
    assert any("tokens each" in note for note in source.notes)
    assert not source.labels_ignored
    (batch,) = input_batches(source.train_data, source.form, Loading(3))
    values = (*batch.args, *batch.kwargs.values())
    assert {tuple(x.shape) for x in values} == {(3, 7)}
    assert {x.dtype for x in values} == {torch.int64}


def test_an_input_shape_gives_the_length(text: Path, tokenizer: str, tmp_path: Path) -> None:
    model = write(tmp_path, OF_TWO)
    source = load_source(model, data=text, tokenizer=tokenizer, input_shape=(1, 16))
    assert source.example_kwargs["input_ids"].shape == (2, 16)


def test_csv_is_read_by_its_column(tokenizer: str, tmp_path: Path) -> None:
    file = tmp_path / "data.csv"
    file.write_text('label,text\n1,"a good, good film"\n0,bad\n', "utf-8")
    data: Any = read_data(file, None, tokenizer=tokenizer)
    assert data.sentences == ["a good, good film", "bad"]
    file.write_text("anything\na film\n")
    assert read_data(file, None, tokenizer=tokenizer).sentences == ["a film"]  # type: ignore[attr-defined]


def test_parquet_is_read_by_its_column(tokenizer: str, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"idx": [0, 1, 2], "sentence": ["a film", None, "it is bad"]})
    parquet.write_table(table, tmp_path / "data.parquet")
    data: Any = read_data(tmp_path / "data.parquet", None, tokenizer=tokenizer)
    assert data.sentences == ["a film", "it is bad"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("data.txt", b"\xff\xfe\x00", "cannot be read"),
        ("data.txt", b"\n \n", "there are no sentences"),
        ("data.csv", b"one,two\na,b\n", "columns of text one, two"),
        ("data.csv", b"", r"columns of text \(none\)"),
    ],
)
def test_a_file_without_sentences_is_refused(
    name: str, content: bytes, said: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    error = refused(write(tmp_path, OF_TWO), data=tmp_path / name, tokenizer="words")
    assert re.search(said, str(error))


def test_a_damaged_parquet_file_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "data.parquet").write_bytes(b"PAR1")
    error = refused(write(tmp_path, OF_TWO), data=tmp_path / "data.parquet", tokenizer="words")
    assert "cannot be read" in str(error)


def test_options_that_do_not_go_together_are_refused(text: Path, tmp_path: Path) -> None:
    model = write(tmp_path, OF_TWO)
    assert "--tokenizer, a folder" in str(refused(model, data=text))
    assert "name a file of them" in str(refused(model, tokenizer="words"))
    assert "(N, tokens)" in str(
        refused(model, data=text, tokenizer="words", input_shape=(1, 3, 8, 8))
    )
    (tmp_path / "x.npy").write_bytes(b"")
    assert "is an array" in str(refused(model, data=tmp_path / "x.npy", tokenizer="words"))


def test_a_tokenizer_that_is_not_there_is_named(text: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "empty").mkdir()
    error = refused(write(tmp_path, OF_TWO), data=text, tokenizer=str(tmp_path / "empty"))
    assert "cannot be loaded" in str(error)


def test_a_tokenizer_with_code_of_its_own_is_refused_without_a_question(
    text: Path, tokenizer: str, tmp_path: Path
) -> None:
    config = Path(tokenizer) / "tokenizer_config.json"
    said = json.loads(config.read_text())
    said |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    config.write_text(json.dumps(said))
    (Path(tokenizer) / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    error = refused(write(tmp_path, OF_TWO), data=text, tokenizer=tokenizer)
    assert "cannot be loaded" in str(error)
    assert not (tmp_path / "ran").exists()


def test_without_transformers_the_way_to_it_is_said(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    error = refused(write(tmp_path, OF_TWO), data=text, tokenizer="words")
    assert "pip install 'sqakd-fx[text]'" in str(error)
