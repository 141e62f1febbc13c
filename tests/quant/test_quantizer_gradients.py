"""Forward and every gradient of every family, width, granularity and role: the papers' formulas in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from brevitas.core.function_wrapper import RoundSte, TensorClamp
from brevitas.core.quant import IntQuant
from brevitas.nn import QuantLinear
from brevitas.quant import Int8WeightPerChannelFloat, Int8WeightPerTensorFloat
from quantizer_reference import (
    ACTIVATIONS,
    NO_ZERO,
    WEIGHTS,
    Array,
    Reference,
    Rule,
    Setting,
    Values,
    qil_transform,
    tanh_transform,
)
from torch import Tensor

from sqakd_fx.quant.families import FAMILIES
from sqakd_fx.quant.quantizer import Quantizer

BITS = range(1, 9)
MODULATIONS = [(0.0, 0.0), (0.3, 0.0), (0.0, 0.4), (0.2, 0.5)]
MOVED = {"step": 0.7, "offset": 0.6, "alpha": 0.6, "lower": 0.6, "upper": 0.7, "gain": 1.2}
"""Factors that bring every learned parameter to where values are clipped on both sides."""
QIL_WEIGHT = {"center": 1.1, "distance": 0.6, "gamma": 1.3}
QIL_ACTIVATION = {"center": 0.7, "distance": 0.7}


def random(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32).astype(np.float64)


def moved(made: Quantizer) -> None:
    """Bring the parameters from where they start to some place of training."""
    factors = MOVED
    if made.family.name == "qil":
        factors = QIL_WEIGHT if made.role == "weight" else QIL_ACTIVATION
        if made.levels.half:  # no level is 0, so that a pruned weight lies between two
            factors = factors | {"center": factors["distance"]}
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.mul_(factors[name])
            if parameter.ndim:
                parameter.mul_(torch.linspace(0.9, 1.1, len(parameter)))


def settled(
    rule: Rule, x: Array, values: Values, g: Array, setting: Setting
) -> tuple[Array, Reference]:
    """`x` with the values drawn again that float32 might round to the other side, and the truth."""
    draws = np.random.default_rng(7)
    for _ in range(60):
        found = rule(x, values, g, setting)
        unsure = (found.distance_to_tie < 1e-3) | (
            (found.distance_to_edge < 1e-3) & (found.distance_to_edge > 0)
        )
        unsure &= np.abs(x) != setting.largest(x)
        if not unsure.any():
            return x, found
        most = 0.9 * setting.largest(x)
        again = np.clip(draws.normal(x.mean(), x.std(), size=x.shape), -most, most)
        x = np.where(unsure, again.astype(np.float32), x).astype(np.float64)
    raise AssertionError("no input without a tie was found")


def shaped(value: Tensor, axis: int | None, ndim: int) -> Array:
    array = value.detach().double().numpy()
    shape = [1] * ndim
    if array.ndim and axis is not None:
        shape[axis] = -1
    return array.reshape(shape)


def compare(made: Quantizer, rule: Rule, x: Array, g: Array, setting: Setting) -> None:
    values = {k: shaped(v, made.axis, x.ndim) for k, v in made.values.items()}
    x, truth = settled(rule, x, values, g, setting)
    given = torch.tensor(x, dtype=torch.float32, requires_grad=True)
    made.zero_grad()
    output = made(given)
    output.backward(torch.tensor(g, dtype=torch.float32))
    assert given.grad is not None
    size = np.abs(truth.output).max()
    np.testing.assert_allclose(output.detach().double(), truth.output, rtol=1e-5, atol=1e-5 * size)
    most = np.abs(truth.gradients["x"]).max()
    np.testing.assert_allclose(
        given.grad.double(), truth.gradients["x"], rtol=1e-3, atol=1e-4 * most
    )
    learned = dict(made.named_parameters())
    assert set(learned) == set(truth.gradients) - {"x"}
    for name, parameter in learned.items():
        assert parameter.grad is not None
        wanted = truth.gradients[name].reshape(parameter.shape)
        typical = np.abs(truth.gradients[name]).mean()
        np.testing.assert_allclose(
            parameter.grad.double(), wanted, rtol=1e-3, atol=2e-3 * typical + 1e-6, err_msg=name
        )


@pytest.mark.parametrize("axis", [None, 0, 1], ids=["tensor", "channel", "channel axis 1"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights(family: str, axis: int | None) -> None:
    assert_weights(family, axis, BITS, MODULATIONS, 127)


@pytest.mark.parametrize("axis", [None, 0], ids=["tensor", "channel"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_within_64(family: str, axis: int | None) -> None:
    # 128 levels without a zero have codes up to 127: at 7 bits these families get a grid with a zero
    widths = (8,) if family in NO_ZERO else (7, 8)
    assert_weights(family, axis, widths, MODULATIONS[:2], 64)


def assert_weights(
    family: str,
    axis: int | None,
    widths: Iterable[int],
    modulations: Iterable[tuple[float, float]],
    largest_code: int,
) -> None:
    x, g = random(0, 5, 6, 9) / 5, random(1, 5, 6, 9)
    axes = tuple(i for i in range(3) if i != axis)
    features = x.size if axis is None else x.size // x.shape[axis]
    for bits, (delta, mu), zero in itertools.product(widths, modulations, (True, False)):
        made = Quantizer(
            family,
            "weight",
            bits,
            channels=None if axis is None else x.shape[axis],
            axis=axis,
            zero_in_grid=zero,
            largest_code=largest_code,
            delta=delta,
            mu=mu,
        )
        made.initialize(torch.tensor(x), "paper")
        moved(made)
        with_zero = zero and family not in NO_ZERO
        setting = Setting(bits, with_zero, axes, features, delta, mu, largest_code)
        compare(made, WEIGHTS[family], x, g, setting)


@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_activations(family: str, signed: bool) -> None:
    x, g = random(2, 6, 8, 7), random(3, 6, 8, 7)
    for bits, (delta, mu) in itertools.product(BITS, MODULATIONS):
        made = Quantizer(family, "activation", bits, delta=delta, mu=mu)
        made.initialize(torch.tensor(x + 0.4 if signed else np.abs(x)), "paper")
        moved(made)
        setting = Setting(bits, True, (0, 1, 2), 8 * 7, delta, mu)
        compare(made, ACTIVATIONS[family], 1.5 * x + 0.4, g, setting)


def slope(of: object, values: dict[str, Array], name: str) -> Array:
    """Central differences of the sum of `of(values)` in every element of one value."""
    assert callable(of)
    base = values[name]
    result = np.zeros_like(base)
    for index in np.ndindex(base.shape):
        ends = []
        for sign in (1, -1):
            shifted = base.copy()
            shifted[index] += sign * 1e-6
            ends.append(float(np.sum(of(values | {name: shifted}))))
        result[index] = (ends[0] - ends[1]) / 2e-6
    return result


def gradients_of(made: Quantizer, x: Array, g: Array) -> dict[str, Array]:
    given = torch.tensor(x, dtype=torch.float32, requires_grad=True)
    made(given).backward(torch.tensor(g, dtype=torch.float32))
    assert given.grad is not None
    found = {n: shaped(p.grad, made.axis, x.ndim) for n, p in made.named_parameters()}  # type: ignore[arg-type]
    return found | {"x": given.grad.double().numpy()}


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("family", ["dorefa", "pact", "ewgs", "qil"])
def test_transforms_follow_finite_differences_where_round_counts_as_the_identity(
    family: str, axis: int | None
) -> None:
    """Without its rounding each of these quantizers is a smooth function of everything it learns."""
    x, g = random(4, 4, 12) / 5, random(5, 4, 12)
    made = Quantizer(family, "weight", 8, channels=4 if axis == 0 else None, axis=axis, delta=0.0)
    made.initialize(torch.tensor(x), "paper")
    moved(made)
    setting = Setting(8, True, (0, 1) if axis is None else (1,), 1)
    values = {k: shaped(v, axis, 2) for k, v in made.values.items()} | {"x": x}

    def smooth(v: dict[str, Array]) -> Array:
        if family == "ewgs":
            unit = np.clip((v["x"] - v["lower"]) / (v["upper"] - v["lower"]), 0, 1)
            return g * v["gain"] * (2 * unit - 1)
        f = qil_transform(v["x"], v) if family == "qil" else tanh_transform(v["x"], setting)
        return g * v["gain"] * f

    found = gradients_of(made, x, g)
    for name, wanted in ((name, slope(smooth, values, name)) for name in found):
        # only the output scale sees what was rounded: half a step of 254 each
        slack = np.abs(g).sum() / 254 if name == "gain" else 1e-4 * np.abs(wanted).max()
        np.testing.assert_allclose(found[name], wanted, rtol=1e-3, atol=slack, err_msg=name)


@pytest.mark.parametrize("bits", range(2, 8))
def test_lsq_weights_per_channel_are_torchs_own_learnable_fake_quantizer(bits: int) -> None:
    x = torch.tensor(random(6, 5, 60), dtype=torch.float32)
    made = Quantizer("lsq", "weight", bits, channels=5, axis=0)
    made.initialize(x, "paper")
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale = made.values["step"].detach().clone().requires_grad_()
    zero = torch.zeros(5, requires_grad=True)
    theirs, mine = x.clone().requires_grad_(), x.clone().requires_grad_()
    # just outside the range, where a value rounds back into it, torch lets the gradient pass and LSQ not
    v = x / scale.detach()[:, None]
    between = ((v > high) & (v <= high + 0.5)) | ((v < low) & (v >= low - 0.5))
    g = torch.where(between, 0.0, torch.tensor(random(7, 5, 60), dtype=torch.float32))
    wanted = torch._fake_quantize_learnable_per_channel_affine(
        theirs, scale, zero, 0, low, high, 1 / math.sqrt(60 * high)
    )
    wanted.backward(g)
    got = made(mine)
    got.backward(g)
    assert torch.allclose(got, wanted, atol=1e-6)
    assert torch.equal(mine.grad, theirs.grad)  # type: ignore[arg-type]
    step = dict(made.named_parameters())["step"].grad
    assert torch.allclose(step, scale.grad, rtol=1e-3, atol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_min_max_weights_are_brevitas(bits: int, per_channel: bool) -> None:
    quant = Int8WeightPerChannelFloat if per_channel else Int8WeightPerTensorFloat
    layer = QuantLinear(40, 6, bias=False, weight_quant=quant, weight_bit_width=bits)
    weight = layer.weight.detach().clone()
    made = Quantizer("minmax", "weight", bits, channels=6 if per_channel else None, axis=0)
    made.initialize(weight, "paper")
    theirs = layer.quant_weight()
    scale = theirs.scale.detach().reshape(-1)
    assert torch.allclose(scale, made.grid(weight).scale.reshape(-1), rtol=1e-6)
    assert torch.allclose(made(weight), theirs.value.detach(), atol=1e-6)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_lsq_activations_are_brevitas_with_a_learned_scale(bits: int, signed: bool) -> None:
    x = torch.tensor(random(8, 6, 50), dtype=torch.float32)
    x = x if signed else x.abs()
    made = Quantizer("lsq", "activation", bits)
    made.initialize(x, "paper")
    theirs = IntQuant(
        narrow_range=False,
        signed=signed,
        input_view_impl=torch.nn.Identity(),
        float_to_int_impl=RoundSte(),
        tensor_clamp_impl=TensorClamp(),
    )
    scale = made.values["step"].detach().clone().requires_grad_()
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    wanted = theirs(scale, torch.tensor(0.0), torch.tensor(float(bits)), a)
    got = made(b)
    high = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    low = -(2 ** (bits - 1)) if signed else 0
    v = x / scale.detach()
    between = ((v > high) & (v <= high + 0.5)) | ((v < low) & (v >= low - 0.5))
    g = torch.where(between, 0.0, torch.tensor(random(9, 6, 50), dtype=torch.float32))
    wanted.backward(g)
    got.backward(g)
    assert torch.allclose(got, wanted, atol=1e-6)
    assert torch.allclose(a.grad, b.grad, rtol=1e-5)  # type: ignore[arg-type]
    step = dict(made.named_parameters())["step"].grad
    assert step is not None
    assert scale.grad is not None
    unshrunk = float(step) * math.sqrt(50 * high)
    assert unshrunk == pytest.approx(float(scale.grad), rel=1e-3, abs=1e-3)
