import math

import pytest
import torch
from functional.terms_maker import PROPERTY, Token, batches, gradients, make_terms, near
from hypothesis import given
from hypothesis import strategies as st

from grpo_lightning.functional.surrogates import sapo

temperatures = st.floats(0.1, 5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "settings", "loss", "gradient"),
    [
        (1.0, 3.0, {}, -6.0, -3.0),  # f(1) = 4 / tau / 2, f'(1) = 1
        (1.0, -2.1, {}, 4.0, 2.1),  # 2 / 1.05 * 2.1
        (1.0, -2.0, {"tau_negative": 2.0}, 2.0, 2.0),
        # ln 3 above 1 the sigmoid is 3 / 4: f = 3, f' = 4 * 3 / 16, and by the log-ratio times r.
        (1 + math.log(3), 1.0, {}, -3.0, -0.75 * (1 + math.log(3))),
        (math.exp(200), 1.0, {}, -4.0, 0.0),
    ],
)
def test_golden_numbers(ratio, advantage, settings, loss, gradient):
    terms = make_terms([Token(log_ratio=math.log(ratio), advantage=advantage, weight=0.5)])
    result = sapo(terms, **settings)
    assert result.loss.tolist() == near([loss])
    assert gradients(terms, result) == [[0.0], near([gradient])]
    assert not result.clipped_low.any()
    assert not result.clipped_high.any()


@PROPERTY
@given(batches(one_advantage=False), temperatures, temperatures)
def test_equals_the_oracle(tokens, positive, negative):
    terms = make_terms(tokens)
    result = sapo(terms, tau_positive=positive, tau_negative=negative)
    losses, slopes = [], []
    for t in tokens:
        tau, r = positive if t.advantage > 0 else negative, math.exp(t.log_ratio)
        s = 1 / (1 + math.exp(-tau * (r - 1)))
        losses.append(-4 / tau * s * t.advantage if t.weight else 0.0)
        slopes.append(-4 * s * (1 - s) * r * t.advantage if t.weight else 0.0)
    assert result.loss.tolist() == near(losses)
    assert gradients(terms, result)[1] == near(slopes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_jump_where_the_gate_saturates(dtype):
    # The sigmoid is cut at 40, ratio 41.
    tokens = [Token(log_ratio=math.log(r), advantage=1.0) for r in (40.9, 41.1, 1e30)]
    terms = make_terms(tokens, dtype)
    result = sapo(terms)
    assert result.loss.tolist() == [-4.0, -4.0, -4.0]
    assert max(map(abs, gradients(terms, result)[1])) < 1e-14


def test_bad_arguments_are_named():
    terms = make_terms([Token()])
    for tau in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="expected tau_positive > 0 and finite, but got"):
            sapo(terms, tau_positive=tau)
        with pytest.raises(ValueError, match="expected tau_negative > 0 and finite, but got"):
            sapo(terms, tau_negative=tau)
