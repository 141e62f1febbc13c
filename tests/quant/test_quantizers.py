"""Every family, at every width: exact codes, and gradients by the papers' formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sqakd_fx.quant.families import FAMILIES
from sqakd_fx.quant.grid import decode
from sqakd_fx.quant.quantizer import Quantizer

NAMES = tuple(FAMILIES)
BITS = tuple(range(1, 9))
ROLES = ("weight", "activation")


def quantizer_of(
    family: str,
    role: str,
    bits: int,
    x: Tensor,
    *,
    per_channel: bool = False,
    method: str = "paper",
) -> Quantizer:
    channels = x.shape[0] if per_channel and role == "weight" else None
    made = Quantizer(family, role, bits, channels=channels, axis=None if channels is None else 0)
    made.initialize(x, method)
    return made


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


hostile = st.one_of(
    st.floats(-4, 4, width=32),
    st.floats(
        width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**90), max_value=2.0**90
    ),
    st.sampled_from([0.0, -0.0, 1e-45, -1e-40, 2.0**-126, 0.5, -0.5, 1.0, 1e30]),
)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("family", NAMES)
def test_the_codes_stand_for_exactly_the_values_trained_with(family: str, role: str) -> None:
    @settings(max_examples=60, deadline=None)
    @given(
        rows=st.lists(st.lists(hostile, min_size=1, max_size=6), min_size=1, max_size=4).filter(
            lambda rows: len({len(r) for r in rows}) == 1
        ),
        bits=st.sampled_from(BITS),
        per_channel=st.booleans(),
        method=st.sampled_from(["paper", "minmax", "percentile", "mse"]),
        factors=st.lists(
            st.sampled_from([1.0, 0.3, -1.0, 0.0, 1e-20, 1e20, 5.0]), min_size=4, max_size=4
        ),
        other=st.lists(hostile, min_size=1, max_size=6),
    )
    def exact(
        rows: list[list[float]],
        bits: int,
        per_channel: bool,
        method: str,
        factors: list[float],
        other: list[float],
    ) -> None:
        x = torch.tensor(rows, dtype=torch.float32)
        made = quantizer_of(family, role, bits, x, per_channel=per_channel, method=method)
        with torch.no_grad():  # wherever training might take the parameters
            for parameter, factor in zip(made.parameters(), factors, strict=False):
                parameter.mul_(factor)
        if role == "activation":
            x = torch.tensor([other], dtype=torch.float32)
        grid, codes = made.grid(x), made.codes(x)
        assert torch.equal(decode(codes, grid), made(x).detach() + 0.0)
        assert int(codes.min()) >= grid.qmin
        assert int(codes.max()) <= grid.qmax
        assert grid.qmax - grid.qmin < 2 ** (bits + (made.levels.half > 0))
        assert bool((grid.scale > 0).all())
        assert bool(torch.isfinite(grid.scale).all())

    exact()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("family", NAMES)
def test_a_value_moves_by_at_most_half_a_step_inside_the_range(
    family: str, role: str, bits: int
) -> None:
    x = normal(4, 300).abs() if role == "activation" else normal(4, 300) / 5
    made = quantizer_of(family, role, bits, x)
    at = made.interval(x)
    v = (made.transformed(x) / at.scale_in + at.offset).double()
    inside = (v >= at.lowest) & (v <= at.lowest + made.levels.span)
    back = made(x).double() / at.scale_out.double() + made.levels.half
    assert ((back - v)[inside].abs() <= 0.5 + 1e-4).all()
    outside = torch.where(v < at.lowest, at.lowest, at.lowest + made.levels.span).double()
    assert torch.allclose(back[~inside], outside[~inside], atol=1e-4)


def straight_through(x: Tensor, scale: Tensor, low: float, high: float) -> Tensor:
    """s · clip(round(x / s)), in float64, with torch's own autograd through round as the identity."""
    v = (x / scale).clamp(low, high)
    return (v + (torch.round(v) - v).detach()) * scale


@pytest.mark.parametrize("bits", range(2, 8))
@pytest.mark.parametrize("role", ROLES)
def test_lsq_is_esser_2020(role: str, bits: int) -> None:
    x = normal(8, 40) if role == "weight" else normal(8, 40).abs()
    made = quantizer_of("lsq", role, bits, x)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if role == "weight" else (0, 2**bits - 1)
    mean = float(x.double().abs().mean())
    assert float(made.step) == pytest.approx(
        2 * mean / math.sqrt(max(high, 1)), rel=0.35 if bits == 2 else 0.2
    )
    x.requires_grad_()
    g = normal(8, 40, seed=1)
    made(x).backward(g)
    s = made.step.detach().double().clone().requires_grad_()
    y = x.detach().double().requires_grad_()
    straight_through(y, s, low, high).backward(g.double())
    elements = x.numel() if role == "weight" else x.numel() // len(x)
    assert torch.allclose(x.grad.double(), y.grad, atol=1e-6)
    wanted = s.grad / math.sqrt(elements * high)
    assert torch.allclose(made.step.grad.double(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bits", range(2, 9))
def test_lsq_is_torchs_own_learnable_fake_quantizer(bits: int) -> None:
    x = normal(6, 50).abs()
    made = quantizer_of("lsq", "activation", bits, x)
    high = 2**bits - 1
    scale = made.step.detach().clone().reshape(1).requires_grad_()
    zero = torch.zeros(1, requires_grad=True)
    factor = 1 / math.sqrt(x.numel() // len(x) * high)
    theirs, mine = x.clone().requires_grad_(), x.clone().requires_grad_()
    # just above the range, where the value rounds back into it, torch lets the gradient pass and LSQ not
    v = x / made.step.detach()
    g = torch.where((v > high) & (v <= high + 0.5), 0.0, normal(6, 50, seed=3))
    wanted = torch._fake_quantize_learnable_per_tensor_affine(theirs, scale, zero, 0, high, factor)
    wanted.backward(g)
    got = made(mine)
    got.backward(g)
    assert torch.allclose(got, wanted, atol=1e-6)
    assert torch.equal(mine.grad, theirs.grad)
    assert torch.allclose(made.step.grad, scale.grad[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("bits", range(1, 9))
def test_pact_is_choi_2018(bits: int) -> None:
    x = normal(8, 40).abs()
    made = quantizer_of("pact", "activation", bits, x, method="minmax")
    with torch.no_grad():
        made.alpha.mul_(0.5)
    alpha = float(made.alpha)
    x.requires_grad_()
    g = normal(8, 40, seed=2)
    got = made(x)
    got.backward(g)
    levels = 2**bits - 1
    y = x.detach().double()
    wanted = torch.round(y.clamp(0, alpha) * levels / alpha) * alpha / levels
    tie = ((y.clamp(0, alpha) * levels / alpha) % 1 - 0.5).abs() < 1e-3
    assert torch.allclose(got.double()[~tie], wanted[~tie], atol=1e-5)
    assert torch.equal(x.grad != 0, (y <= alpha) & (g != 0))
    assert float(made.alpha.grad) == pytest.approx(
        float(g[y >= alpha].double().sum()), rel=1e-4, abs=1e-4
    )


@pytest.mark.parametrize("bits", range(1, 9))
def test_dorefa_weights_are_zhou_2016(bits: int) -> None:
    w = normal(6, 30).double()
    made = quantizer_of("dorefa", "weight", bits, w.float())
    squashed = torch.tanh(w) / torch.tanh(w).abs().max()
    n = 2**bits - 1 if bits < 8 else 254
    unit = 2 * torch.round((squashed + 1) / 2 * n) / n - 1
    tie = (((squashed + 1) / 2 * n) % 1 - 0.5).abs() < 1e-3
    got = made(w.float()).double() / float(made.gain)
    assert torch.allclose(got[~tie], unit[~tie], atol=1e-5)
    x = w.float().requires_grad_()
    g = normal(6, 30, seed=4)
    made(x).backward(g)
    y = w.clone().requires_grad_()
    smooth = torch.tanh(y) / torch.tanh(y).abs().max() * float(made.gain)
    smooth.backward(g.double())
    assert torch.allclose(x.grad.double(), y.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("delta", [0.0, 1e-3, 0.2])
@pytest.mark.parametrize("bits", range(1, 9))
def test_ewgs_activations_are_lee_2021(bits: int, delta: float) -> None:
    x = normal(8, 40).abs()
    made = Quantizer("ewgs", "activation", bits, delta=delta)
    made.initialize(x, "paper")
    with torch.no_grad():
        made.upper.mul_(0.6)
    lower, upper = float(made.lower), float(made.upper)
    x.requires_grad_()
    g = normal(8, 40, seed=5)
    made(x).backward(g)
    y = x.detach().double()
    n = 2**bits - 1
    c = ((y - lower) / (upper - lower)).clamp(0, 1)
    q = torch.round(c * n) / n
    inside = (y >= lower) & (y <= upper)
    scaled = g.double() * (upper - lower)
    g_c = scaled * (1 + delta * torch.sign(scaled) * (c - q))
    tie = ((c * n) % 1 - 0.5).abs() < 1e-3
    wanted = torch.where(inside, g_c / (upper - lower), 0.0)
    assert torch.allclose(x.grad.double()[~tie], wanted[~tie], atol=1e-5)


@pytest.mark.parametrize("mu", [0.0, 0.5])
def test_a_constant_mu_adds_the_discretization_error(mu: float) -> None:
    """SQAKD: g_c = g_q + μ (c - q/(n-1))."""
    x = normal(5, 20).abs()
    made = Quantizer("minmax", "activation", 3, mu=mu)
    made.initialize(x, "minmax")
    y = x.clone().requires_grad_()
    g = normal(5, 20, seed=6)
    made(y).backward(g)
    wide = float(made.upper - made.lower)
    c = (x.double() - float(made.lower)) / wide
    q = torch.round(c * 7) / 7
    wanted = g.double() + mu * (c - q) / wide
    assert torch.allclose(y.grad.double(), wanted, atol=1e-5)


@pytest.mark.parametrize("family", [n for n in NAMES if FAMILIES[n].activation.learned])
def test_learned_ranges_follow_finite_differences_where_nothing_is_rounded(family: str) -> None:
    """Far outside the range the output is the clip itself, a smooth function of the parameters."""
    x = normal(4, 30)
    made = quantizer_of(family, "activation", 8, x, method="minmax").double()
    far = torch.full((4, 30), 1e3)
    made(far).sum().backward()
    for name in made.side.learned:
        parameter = getattr(made, name)
        if parameter.grad is None:
            continue
        gradient = float(parameter.grad)
        highest = made.levels.span + float(made.values.get("lowest", torch.tensor(0.0)))
        elements = far.numel() // len(far) * highest
        if name in ("step", "offset"):
            gradient *= math.sqrt(elements)
        value = float(parameter)
        h = 0.1 * (abs(value) if name == "step" else 1.0)
        with torch.no_grad():
            parameter.fill_(value + h)
            above = float(made(far).double().sum())
            parameter.fill_(value - h)
            below = float(made(far).double().sum())
            parameter.fill_(value)
        slope = (above - below) / (2 * h)
        # the zero point moves in whole steps, the gradient does not
        assert gradient == pytest.approx(slope, rel=0.1, abs=0.1 * far.numel())


@pytest.mark.parametrize("family", NAMES)
def test_a_power_of_two_scale_is_one(family: str) -> None:
    x = normal(4, 30)
    for role in ROLES:
        made = Quantizer(family, role, 4, power_of_two=True)
        made.initialize(x)
        mantissa, _ = torch.frexp(made.grid(x).scale)
        assert bool((mantissa == 0.5).all())
        assert torch.equal(decode(made.codes(x), made.grid(x)), made(x).detach() + 0.0)
