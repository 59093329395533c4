import math

import pytest
import torch
from functional.terms_maker import PROPERTY, Token, batches, gradients, make_terms, near
from hypothesis import assume, given
from hypothesis import strategies as st

from grpo_lightning.functional.surrogates import dppo
from grpo_lightning.functional.surrogates.dppo import binary_kl, binary_tv


def divergence_of(name, old, new):
    if name == "tv":
        return abs(new - old)
    return old * math.log(old / new) + (1 - old) * math.log((1 - old) / (1 - new))


def moved(old, new, advantage, **kwargs):
    return Token(math.log(new), math.log(new / old), advantage, **kwargs)


@pytest.mark.parametrize(
    ("old", "new", "advantage", "loss", "gradient", "low", "high"),
    [
        (0.5, 0.6, 2.0, -2.4, -2.4, False, False),  # 0.1 away
        (0.5, 0.7, 2.0, 0.0, 0.0, False, True),  # 0.2 away and on its way
        (0.5, 0.7, -2.0, 2.8, 2.8, False, False),  # 0.2 away but on its way back
        (0.5, 0.3, 2.0, -1.2, -1.2, False, False),
        (0.5, 0.3, -2.0, 0.0, 0.0, True, False),
        (0.001, 0.1, 1.0, -100.0, -100.0, False, False),  # a ratio of 100, but only 0.099 away
        (0.99, 0.8, -1.0, 0.0, 0.0, True, False),  # a ratio of 0.81 that PPO would not clip, 0.19 away
        (0.5, 0.9, 0.0, 0.0, 0.0, False, False),
    ],
)
def test_golden_numbers_of_total_variation(old, new, advantage, loss, gradient, low, high):
    terms = make_terms([moved(old, new, advantage)])
    result = dppo(terms)
    assert result.loss.tolist() == near([loss])
    assert gradients(terms, result) == [[0.0], near([gradient])]
    assert (result.clipped_low.tolist(), result.clipped_high.tolist()) == ([low], [high])


def test_golden_divergences():
    old, new = (torch.tensor(p, dtype=torch.float64).log() for p in ([0.5, 0.5], [0.8, 0.2]))
    # 0.5 ln(0.5 / 0.8) + 0.5 ln(0.5 / 0.2) = 0.5 ln(0.25 / 0.16) = ln 1.25
    assert binary_kl(old, new).tolist() == near([math.log(1.25)] * 2)
    assert binary_tv(old, new).tolist() == near([0.3, 0.3])


@pytest.mark.parametrize(("threshold", "stopped"), [(0.22, True), (0.23, False)])
def test_golden_threshold_of_kl(threshold, stopped):
    # ln 1.25 = 0.2231, see above.
    terms = make_terms([moved(0.5, 0.8, 1.0), moved(0.5, 0.2, -1.0)])
    result = dppo(terms, divergence="kl", threshold=threshold)
    assert result.clipped_high.tolist() == [stopped, False]
    assert result.clipped_low.tolist() == [False, stopped]


def test_divergences_at_certain_and_impossible_tokens():
    # Certain twice; certain before; certain now (its alternatives have died out); impossible now; impossible before.
    old = torch.tensor([0.0, 0.0, -1.0, -1.0, -500.0])
    new = torch.tensor([0.0, -1.0, 0.0, -math.inf, -1.0])
    kl = binary_kl(old, new).tolist()
    assert kl == [0.0, 1.0, math.inf, math.inf, pytest.approx(-math.log(1 - math.exp(-1)), rel=1e-6)]
    tv = [0.0, 1 - math.exp(-1), 1 - math.exp(-1), math.exp(-1), math.exp(-1)]
    assert binary_tv(old, new).tolist() == pytest.approx(tv, rel=1e-6)


def test_rounding_above_probability_one_is_harmless():
    terms = make_terms([Token(1e-7, 2e-7, 1.0), Token(0.0, 0.0, -1.0)], torch.float32)
    for name in ("tv", "kl"):
        result = dppo(terms, divergence=name, threshold=0.0)
        assert bool(result.loss.isfinite().all())
    # The old log-probability comes out as 1e-7; the token has moved by about one nat.
    terms = make_terms([Token(-1.0, -1.0000001, -1.0)])
    assert dppo(terms, divergence="kl", threshold=0.5).clipped_low.tolist() == [True]


@pytest.mark.parametrize("name", ["tv", "kl"])
@PROPERTY
@given(batches(one_advantage=False), st.floats(0, 0.3))
def test_equals_the_oracle(name, tokens, threshold):
    losses, slopes, flags = [], [], []
    for t in tokens:
        # Probabilities of 1 have their own test.
        assume(t.logprob < -1e-3 and t.logprob - t.log_ratio < -1e-3)
        value = divergence_of(name, math.exp(t.logprob - t.log_ratio), math.exp(t.logprob))
        assume(abs(value - threshold) > 1e-9)
        away = t.weight != 0 and value > threshold and t.log_ratio * t.advantage > 0
        slope = -math.exp(t.log_ratio) * t.advantage if t.weight and not away else 0.0
        losses.append(slope)
        slopes.append(slope)
        flags.append((away and t.advantage < 0, away and t.advantage > 0))
    terms = make_terms(tokens)
    result = dppo(terms, divergence=name, threshold=threshold)
    assert result.loss.tolist() == near(losses)
    assert gradients(terms, result)[1] == near(slopes)
    assert list(zip(result.clipped_low.tolist(), result.clipped_high.tolist(), strict=True)) == flags


def test_bad_arguments_are_named():
    terms = make_terms([Token()])
    with pytest.raises(ValueError, match=r"expected divergence of \('tv', 'kl'\), but got 'js'"):
        dppo(terms, divergence="js")
    for threshold in (-0.1, math.nan):
        with pytest.raises(ValueError, match="expected threshold >= 0, but got"):
            dppo(terms, threshold=threshold)
