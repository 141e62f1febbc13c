"""Presets: settings for a bit width, and those of the paper's runs.

What is not said here is a recipe's default (`keys.py`). Settings for a width are those that measured best.
"""

from __future__ import annotations

import re
from typing import Any

from sqakd_fx.diagnostics.wording import did_you_mean
from sqakd_fx.errors import RecipeError


def _bits_preset(weight: int, activation: int) -> dict[str, Any]:
    lowest = min(weight, activation)
    values: dict[str, Any] = {"weight_bits": weight, "activation_bits": activation}
    if lowest >= 4:
        values |= {"batch_norm": "fold"}  # batch statistics are not what the teacher computes with
    if lowest >= 7:
        # calibration is nearer to the teacher than training in large steps ends
        values |= {"learning_rate": 1e-5, "epochs": 2}
        values |= {"quantizer_rate": "relative", "quantizer_learning_rate": 1e-4}
        values |= {"initialization": "output", "bias_correction": True, "rounding": "compensated"}
    elif lowest >= 4:
        values |= {"epochs": 4, "learning_rate": 3e-4}
    else:
        values |= {"epochs": 8, "learning_rate": 2e-3 if lowest <= 2 else 3e-3}
        values |= {"quantizer_rate": "relative", "quantizer_learning_rate": 1e-2}
        values |= {"feature_weight": 1.0, "features": "sums", "feature_target": "float"}
    if activation == 8 and 3 <= weight <= 6:
        # what few levels of weights cost is most of the error, and activations are as at W8A8
        values |= {"initialization": "output", "bias_correction": True, "rounding": "compensated"}
        values |= {"learning_rate": 5e-5}  # larger steps undo the start
        values |= {"quantizer_rate": "relative", "quantizer_learning_rate": 1e-4}
    if lowest <= 2:
        # few bits cannot follow the teacher's features to the end
        values |= {"temperature": 2.0, "feature_fade": 0.6 if lowest == 1 else 1.0}
    if lowest == 2:
        values |= {"optimizer": "adamw", "weight_decay": 0.2, "delta": 0.1}
        if activation == 2:
            values |= {"activation_family": "ewgs"}
    if weight == 2:
        values |= {"zero_in_grid": False}
    if weight == 1:
        values |= {"weight_family": "ewgs"}
    if activation == 1:
        values |= {"activation_family": "ewgs", "activation_affine": "channel"}
    return values


_ADAM = {"optimizer": "adam"}
_SGD = {"optimizer": "sgd", "learning_rate": 5e-4, "quantizer_learning_rate": 5e-4}
PAPER_RUNS: dict[str, dict[str, Any]] = {
    "cifar10": _ADAM
    | {"learning_rate": 1e-3, "quantizer_learning_rate": 1e-5, "weight_decay": 1e-4}
    | {"batch_size": 256, "epochs": 1200},
    "cifar100": _ADAM
    | {"learning_rate": 5e-4, "quantizer_learning_rate": 5e-6, "weight_decay": 5e-4}
    | {"batch_size": 64, "epochs": 720},
    "tiny-imagenet": _SGD | {"weight_decay": 5e-4, "batch_size": 64, "epochs": 100},
}
"""Optimizer, batch and length of the paper's runs, by data set."""

PAPER_FAMILIES = {
    "ewgs": "cifar10",
    "pact": "tiny-imagenet",
    "lsq": "tiny-imagenet",
    "dorefa": "tiny-imagenet",
}
"""The paper's families and the data set whose run a preset takes that names none."""


def _paper_preset(family: str, run: str | None, weight: int, activation: int) -> dict[str, Any]:
    return {
        "weight_bits": weight,
        "activation_bits": activation,
        "weight_family": family,
        "activation_family": family,
        "granularity": "tensor",
        "first_last": "float",
        "projections": "same",
        "depthwise": "same",
        "initialization": "paper",
        "schedule": "cosine",
        "warmup": 0.0,
        "quantizer_rate": "absolute",
    } | PAPER_RUNS[run or PAPER_FAMILIES[family]]


def preset_names() -> list[str]:
    """The goals and the presets worth listing; any wNaM with bits from 1 to 8 works as well, and
    paper/DATASET/FAMILY-wNaM with the data sets of `PAPER_RUNS`."""
    short = [f"w{b}a{b}" for b in (8, 4, 3, 2, 1)] + ["w4a8", "w2a8"]
    return [*GOALS, *short] + [
        f"paper/{f}-w{b}a{b}" for f in PAPER_FAMILIES for b in (8, 4, 3, 2, 1)
    ]


GOALS: dict[str, dict[str, Any]] = {
    "speed": _bits_preset(8, 8) | {"name": "w8a8", "steps": 64},
    "size": _bits_preset(4, 8) | {"name": "w4a8-packed", "steps": 256, "profile": "packed"},
    "accuracy": _bits_preset(8, 8) | {"name": "w8a8-accuracy", "tolerance": 0.02},
}
"""What `--for` chooses: a file that is fast, small, or nearest to the float model."""

_WHEN = {
    "speed": "the default: W8A8 in 64 steps; about a quarter of the size of float, and usually faster",
    "size": "weights of 4 bits in 4 bits of the file (W4A8, packed), 256 steps",
    "accuracy": "W8A8, two passes over the data, and more in float where 8 bits cost more than 2 %",
    "w8a8": "as speed, with two passes over the data",
    "w4a8": 'weights of half the size at little loss; stored at 4 bits with profile = "packed"',
    "w4a4": "as w4a8, for hardware with 4-bit arithmetic; ONNX Runtime computes in 8 bits",
    "w3a3": "research at low bits: expect some loss, and train longer",
    "w2a2": "research at low bits: expect a loss, and train much longer",
    "w2a8": "the smallest weights that keep most of the accuracy",
    "w1a1": "binary networks: expect a large loss",
}


def when_to_use(name: str) -> str:
    """One line on when a preset of `preset_names` is the right one."""
    if not name.startswith("paper/"):
        return _WHEN[name]
    family, _, bits = name.removeprefix("paper/").partition("-")
    return f"the published run of {family.upper()} at {bits}, to compare with"


_SPELLINGS = (
    r"(?:u?int|u|i)?[-_]?(?P<both>\d+)[-_]?(?:bits?)?",
    r"a(?P<a>\d+)[-_/x,]?w(?P<w>\d+)",
    r"w?(?P<w>\d+)[-_/x,]a?(?P<a>\d+)",
    r"w(?P<w>\d+)(?P<a>)",
)
_FLOATS = r"(?:fp|bf|f|nf|tf|float|bfloat|mxfp)-?\d+.*|e\d+m\d+.*|float|half|double"


def _spelt_out(name: str) -> str:
    """Bits as wNaM, however they are written: int8, 8bit, W4A8, 4/8, w4 (activations then have 8 bits)."""
    text = name.strip().lower()
    if re.fullmatch(_FLOATS, text):
        raise RecipeError(
            f"{name!r} is a float format, and the file holds integers of 1 to 8 bits: choose w8a8, w4a8 or other bits"
        )
    for spelling in _SPELLINGS:
        if match := re.fullmatch(spelling, text):
            found = match.groupdict()
            both = found.get("both")
            return f"w{both or found['w']}a{both or found['a'] or 8}"
    return text if re.fullmatch(r"w\d+a\d+", text) else name


def preset_values(name: str) -> dict[str, Any]:
    """The settings of a preset that differ from the defaults.

    Raises:
        RecipeError: no such preset; names the nearest.
    """
    if name in GOALS:
        return dict(GOALS[name])
    name = _spelt_out(name)
    match = re.fullmatch(
        r"(?:paper/(?:(?P<run>[\w-]+)/)?(?P<family>[\w+]+)-)?w(?P<w>\d+)a(?P<a>\d+)", name
    )
    if match:
        weight, activation = _bits(match["w"], name), _bits(match["a"], name)
        if match["family"] is None:
            return {"name": name} | _bits_preset(weight, activation)
        if match["family"] in PAPER_FAMILIES and match["run"] in (None, *PAPER_RUNS):
            paper = _paper_preset(match["family"], match["run"], weight, activation)
            return {"name": name} | paper
    near = did_you_mean(name, preset_names(), cutoff=0.4)
    raise RecipeError(
        f"there is no preset or recipe file {name!r}: "
        + (f"{near} " if near else "")
        + "`sqakd-fx recipes` lists them"
    )


def _bits(text: str, where: str) -> int:
    bits = int(text)
    if not 1 <= bits <= 8:
        raise RecipeError(f"{where!r} asks for {bits} bits: choose 1 to 8, as in w4a4")
    return bits
