import math

import pytest
from functional.terms_maker import PROPERTY, Token, batches, gradients, make_terms, near
from hypothesis import given
from hypothesis import strategies as st

from grpo_lightning.functional.surrogates import kl_cov


def test_golden_numbers():
    # Ratio 2 and advantage 3: -6 and slope -6; marked, ln 2 and slope 1 more; ratio 1/2 marked: ln 2 and slope -1.
    lines = [(2.0, 3.0, False), (2.0, 3.0, True), (0.5, 3.0, True), (1.0, 3.0, True), (2.0, 0.0, True)]
    terms = make_terms([Token(log_ratio=math.log(r), advantage=a, marked=m) for r, a, m in lines])
    result, ln2 = kl_cov(terms), math.log(2)
    assert result.loss.tolist() == near([-6.0, -6 + ln2, -1.5 + ln2, -3.0, ln2])
    assert gradients(terms, result) == [[0.0] * 5, near([-6.0, -5.0, -2.5, -3.0, 1.0])]
    assert kl_cov(terms, kl_cov_coef=0.0).loss.tolist() == near([-6.0, -6.0, -1.5, -3.0, 0.0])
    assert not result.clipped_low.any()
    assert not result.clipped_high.any()


@PROPERTY
@given(batches(one_advantage=False), st.floats(0, 3))
def test_equals_the_oracle(tokens, coef):
    terms = make_terms(tokens)
    result = kl_cov(terms, kl_cov_coef=coef)
    losses, slopes = [], []
    for t in tokens:
        plain = -math.exp(t.log_ratio) * t.advantage
        penalty = coef if t.marked else 0.0
        sign = (t.log_ratio > 0) - (t.log_ratio < 0)
        losses.append(plain + penalty * abs(t.log_ratio) if t.weight else 0.0)
        slopes.append(plain + penalty * sign if t.weight else 0.0)
    assert result.loss.tolist() == near(losses)
    assert gradients(terms, result)[1] == near(slopes)


def test_bad_arguments_are_named():
    for coef in (-0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match="expected kl_cov_coef >= 0 and finite, but got"):
            kl_cov(make_terms([Token()]), kl_cov_coef=coef)
