import math

import pytest
from functional.terms_maker import PROPERTY, Token, batches, gradients, make_terms, near
from hypothesis import given
from hypothesis import strategies as st

from grpo_lightning.functional.surrogates import vespo

exponents = st.floats(0, 4)


@pytest.mark.parametrize(
    ("ratio", "advantage", "settings", "weight"),
    [
        (1.0, 3.0, {}, 1.0),
        (1.0, -3.0, {}, 1.0),
        (0.5, 2.0, {}, 0.25 * math.exp(1.5)),  # 0.5^2 e^(3 (1 - 0.5))
        (2.0, 2.0, {}, 4 * math.exp(-3)),
        (0.5, -2.0, {}, 0.125 * math.e),  # 0.5^3 e^(2 (1 - 0.5))
        (2.0, -2.0, {"k_negative": 1.0, "lambda_negative": 0.0}, 2.0),
        (math.exp(200), 1.0, {}, 0.0),
        (math.exp(-200), 1.0, {}, 1e-16 * math.exp(3 - 3e-8)),  # as if the ratio were 1e-8
    ],
)
def test_golden_numbers(ratio, advantage, settings, weight):
    terms = make_terms([Token(logprob=-2.0, log_ratio=math.log(ratio), advantage=advantage, weight=0.5)])
    result = vespo(terms, **settings)
    assert result.loss.tolist() == near([2 * weight * advantage])
    assert gradients(terms, result) == [near([-weight * advantage]), [0.0]]
    assert not (result.clipped_low | result.clipped_high).any()


@PROPERTY
@given(batches(one_advantage=False), exponents, exponents, exponents, exponents)
def test_equals_the_oracle(tokens, k_good, rate_good, k_bad, rate_bad):
    terms = make_terms(tokens)
    settings = {"k_positive": k_good, "lambda_positive": rate_good}
    settings |= {"k_negative": k_bad, "lambda_negative": rate_bad}
    losses = []
    for t in tokens:
        k, rate = (k_good, rate_good) if t.advantage >= 0 else (k_bad, rate_bad)
        w = max(math.exp(t.log_ratio), 1e-8)
        losses.append(-(w**k) * math.exp(rate - rate * w) * t.advantage * t.logprob if t.weight else 0.0)
    assert vespo(terms, **settings).loss.tolist() == near(losses)


@pytest.mark.parametrize("name", ["k_positive", "lambda_positive", "k_negative", "lambda_negative"])
def test_bad_arguments_are_named(name):
    for value in (-0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"expected {name} >= 0 and finite, but got"):
            vespo(make_terms([Token()]), **{name: value})
