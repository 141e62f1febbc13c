"""Sentences of a file as unlabelled samples: a text file, CSV or Parquet, through a tokenizer of transformers."""

from __future__ import annotations

import csv
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sqakd_fx.errors import SourceError, short
from sqakd_fx.source.libraries import library

SUFFIXES = (".txt", ".csv", ".parquet")
_COLUMNS = ("text", "sentence", "content")
_LONGEST = 128
"""Tokens of a sample where the model does not say how many it takes."""
_LOOKED_AT = 1000
"""Sentences from which the length is found."""


class Sentences(Dataset[dict[str, Tensor]]):
    """Each sentence as the tokenizer's dict of tensors, padded and cut to `length` tokens.

    `takes` are the names of the model's inputs. Of the tokenizer's keys those among them are given; a model whose one
    input has another name is given the token ids.
    """

    def __init__(
        self, sentences: Sequence[str], tokenizer: Any, length: int | None, takes: Collection[str]
    ) -> None:
        self.sentences, self.tokenizer = sentences, tokenizer
        sizes = [len(tokenizer(one)["input_ids"]) for one in sentences[:_LOOKED_AT]]
        self.length = length or min(max(sizes), _LONGEST, tokenizer.model_max_length)
        self.cut = sum(size > self.length for size in sizes) / len(sizes)
        self.names = self._names(takes)

    def __len__(self) -> int:
        return len(self.sentences)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = self._tokens(index)
        return {name: torch.tensor(tokens[key]) for key, name in self.names.items()}

    def note(self) -> str:
        """What happens to a sentence, in one line."""
        return (
            f"sentences become {self.length} tokens each: {', '.join(self.names.values())}; longer ones are cut "
            f"({self.cut:.0%}), shorter ones padded"
        )

    def _tokens(self, index: int) -> Any:
        return self.tokenizer(
            self.sentences[index], padding="max_length", truncation=True, max_length=self.length
        )

    def _names(self, takes: Collection[str]) -> dict[str, str]:
        """The model's name of each of the tokenizer's keys that it takes."""
        keys = list(self._tokens(0))
        taken = {key: key for key in keys if key in takes or not takes}
        if not taken and len(takes) == 1:
            return {"input_ids": next(iter(takes))}
        if not taken:
            raise SourceError(
                f"the tokenizer gives {', '.join(keys)}, and the model takes {', '.join(takes)}: "
                "join them in train_data() of model.py"
            )
        return taken


def read_text(
    path: Path, shape: tuple[int, ...] | None, tokenizer: str | None, takes: Collection[str]
) -> Sentences:
    """Samples of a file of sentences for a model whose first input has `shape`.

    Raises:
        SourceError: the file or the tokenizer cannot be read, or a library for it is not installed.
    """
    if tokenizer is None:
        raise SourceError(
            f"--data {path} holds sentences: name their tokenizer with --tokenizer, a folder or a model's name"
        )
    if shape is not None and len(shape) != 2:
        raise SourceError(
            f"sentences in {path} become inputs of shape (N, tokens), and the model takes {shape}: "
            "write train_data() in model.py"
        )
    sentences = [one for one in map(str.strip, _read(path)) if one]
    if not sentences:
        raise SourceError(f"there are no sentences in {path}: write one on each line or row")
    length = None if shape is None else shape[1]
    loaded = _load_tokenizer(tokenizer)
    try:
        return Sentences(sentences, loaded, length, takes)
    except (ValueError, TypeError, KeyError) as error:
        raise SourceError(
            f"the tokenizer {tokenizer} cannot be used ({short(error)}): give one that pads, "
            "or write train_data() in model.py"
        ) from error


def _load_tokenizer(name: str) -> Any:
    transformers = library("transformers", "--tokenizer", "text")
    try:
        return transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        raise SourceError(
            f"--tokenizer {name} cannot be loaded ({short(error)}): give a folder of save_pretrained, "
            "or the name of a model of the Hugging Face hub"
        ) from error


def _read(path: Path) -> list[str]:
    try:
        if path.suffix == ".txt":
            return path.read_text("utf-8").splitlines()
        if path.suffix == ".csv":
            return _of_csv(path)
        return _of_parquet(path)
    except (OSError, ValueError, NotImplementedError, csv.Error) as error:
        raise SourceError(
            f"the sentences in {path} cannot be read ({short(error)}): give text in UTF-8, one sentence a line, "
            "or CSV with a header, or Parquet"
        ) from error


def _of_csv(path: Path) -> list[str]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        column = _column(list(rows.fieldnames or ()), path)
        return [row[column] or "" for row in rows]


def _of_parquet(path: Path) -> list[str]:
    parquet = library("pyarrow.parquet", f"--data {path}", "text")
    schema = parquet.read_schema(path)
    names = [field.name for field in schema if str(field.type) in ("string", "large_string")]
    column = _column(names, path)
    values = parquet.read_table(path, columns=[column])[column].to_pylist()
    return [value or "" for value in values]


def _column(names: Sequence[str], path: Path) -> str:
    """The column of the sentences: the only one, or one that is called so."""
    if len(names) == 1:
        return names[0]
    found = next((name for name in _COLUMNS if name in names), None)
    if found is None:
        raise SourceError(
            f"{path} has the columns of text {', '.join(names) or '(none)'}: "
            f"call that of the sentences {', '.join(_COLUMNS[:-1])} or {_COLUMNS[-1]}"
        )
    return found
