"""Every public module and function of torch.nn with arguments that people give it.

They stand in torch_nn_cases.txt, one call a line: the inputs' name in INPUTS, and an expression of x (and y). A module
is written as it is made, and as `module -> expression` where it is not called with the inputs alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TABLE = Path(__file__).with_suffix(".txt")


def _draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


INPUTS: dict[str, tuple[Tensor, ...]] = {
    "rows": (_draw(4, 6),),
    "two_rows": (_draw(4, 6), _draw(4, 6).flip(0)),
    "signal": (_draw(4, 6, 10),),
    "image": (_draw(4, 8, 9, 10),),
    "volume": (_draw(4, 4, 6, 7, 5),),
    "columns": (_draw(4, 12, 20),),
    "ids": (torch.tensor([[3, 7, 2, 0], [5, 1, 8, 9], [6, 2, 0, 0], [1, 9, 4, 3]]),),
}
"""Inputs by name; the first axis is the batch."""

_NOT_TRIED = (
    (
        "a loss compares outputs with labels: it belongs to training, not to a model",
        "BCELoss BCEWithLogitsLoss CTCLoss CosineEmbeddingLoss CrossEntropyLoss GaussianNLLLoss HingeEmbeddingLoss "
        "HuberLoss KLDivLoss L1Loss LinearCrossEntropyLoss LinearCrossEntropyOptions MSELoss MarginRankingLoss "
        "MultiLabelMarginLoss MultiLabelSoftMarginLoss MultiMarginLoss NLLLoss NLLLoss2d PoissonNLLLoss SmoothL1Loss "
        "SoftMarginLoss TripletMarginLoss TripletMarginWithDistanceLoss AdaptiveLogSoftmaxWithLoss "
        "binary_cross_entropy binary_cross_entropy_with_logits cosine_embedding_loss cross_entropy ctc_loss "
        "gaussian_nll_loss hinge_embedding_loss huber_loss kl_div l1_loss linear_cross_entropy margin_ranking_loss "
        "mse_loss multi_margin_loss multilabel_margin_loss multilabel_soft_margin_loss nll_loss poisson_nll_loss "
        "smooth_l1_loss soft_margin_loss triplet_margin_loss triplet_margin_with_distance_loss",
    ),
    (
        "holds modules or parameters, and computes nothing itself",
        "Container Module ModuleDict ModuleList Sequential ParameterDict ParameterList Parameter Buffer DataParallel "
        "UninitializedBuffer UninitializedParameter",
    ),
    (
        "becomes its plain class at the first call, before the model is traced",
        "LazyBatchNorm1d LazyBatchNorm2d LazyBatchNorm3d LazyConv1d LazyConv2d LazyConv3d LazyConvTranspose1d "
        "LazyConvTranspose2d LazyConvTranspose3d LazyInstanceNorm1d LazyInstanceNorm2d LazyInstanceNorm3d LazyLinear",
    ),
    ("a base class, whose kinds are tried", "RNNBase RNNCellBase"),
    (
        "a helper inside torch",
        "assert_int_or_pair boolean_dispatch handle_torch_function has_torch_function has_torch_function_unary "
        "has_torch_function_variadic",
    ),
    ("takes 8-bit floats on a GPU", "scaled_grouped_mm scaled_mm"),
    (
        "products of groups of rows, as mixtures of experts call it: `transformers/mixtral` has it",
        "grouped_mm",
    ),
)

LEFT_OUT = {name: reason for reason, names in _NOT_TRIED for name in names.split()}
"""Public names that no case has, and why."""


@dataclass(frozen=True)
class Case:
    """One call: the public name, the call as a user writes it, its inputs, and what makes the module."""

    name: str
    text: str
    inputs: str
    make: Callable[[], nn.Module]


class Called(nn.Module):
    """A module, or nothing, in an expression of the inputs x and y."""

    def __init__(self, module: nn.Module | None, expression: str) -> None:
        super().__init__()
        self.module = module
        names = {"F": F, "nn": nn, "torch": torch}
        code = compile(f"lambda m, x, y=None: {expression}", expression, "eval")
        self.function: Callable[..., Any] = eval(code, names)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self.module, *inputs)


def _module_case(inputs: str, text: str) -> Case:
    made, _, call = (part.strip() for part in text.partition("->"))
    names = {"F": F, "nn": nn, "torch": torch}
    code = compile(f"nn.{made}", made, "eval")
    name = made.partition("(")[0]
    return Case(name, text, inputs, lambda: Called(eval(code, names), call or "m(x)"))


def _function_case(inputs: str, text: str) -> Case:
    return Case(text.partition("(")[0], text, inputs, lambda: Called(None, f"F.{text}"))


def all_cases() -> list[Case]:
    """Every case of which the installed torch has the name."""
    found: list[Case] = []
    make, namespace = _module_case, nn
    for line in TABLE.read_text().splitlines():
        if line.startswith("# functions"):
            make, namespace = _function_case, F
        elif not line.startswith("#"):
            inputs, _, text = line.partition(" | ")
            found.append(make(inputs, text))
            if not hasattr(namespace, found[-1].name):
                found.pop()
    return found


def public_names() -> list[str]:
    """The classes of torch.nn and the functions of torch.nn.functional."""
    classes = [n for n, v in vars(nn).items() if isinstance(v, type)]
    functions = [n for n, v in vars(F).items() if inspect.isroutine(v)]
    return sorted({n for n in (*classes, *functions) if not n.startswith("_")})
