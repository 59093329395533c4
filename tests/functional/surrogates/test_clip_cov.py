import math

import pytest
from functional.terms_maker import PROPERTY, Token, batches, gradients, make_terms, near
from hypothesis import given

from grpo_lightning.functional.surrogates import clip_cov


def oracle(t):
    """Loss, gradient in the log-ratio and flags of one token, by cases, with clips 0.2 and 0.28."""
    r = math.exp(t.log_ratio)
    if t.weight == 0 or t.marked:
        return 0.0, 0.0, False, False
    if t.advantage > 0 and r > 1.28:
        return -1.28 * t.advantage, 0.0, False, True
    if t.advantage < 0 and r < 0.8:
        return -0.8 * t.advantage, 0.0, True, False
    return -r * t.advantage, -r * t.advantage, False, False


def test_golden_numbers():
    # A marked token, one within the clips, one above them, one marked and above, one below, one marked and below.
    lines = [(1.1, 2.0, True), (1.1, 2.0, False), (1.5, 2.0, False), (1.5, 2.0, True), (0.5, -1.0, False)]
    lines.append((0.5, -1.0, True))
    terms = make_terms([Token(log_ratio=math.log(r), advantage=a, marked=m) for r, a, m in lines])
    result = clip_cov(terms)
    assert result.loss.tolist() == near([0.0, -2.2, -2.4, 0.0, 0.8, 0.0])
    assert gradients(terms, result)[1] == near([0.0, -2.2, 0.0, 0.0, 0.0, 0.0])
    assert result.clipped_low.tolist() == [False, False, False, False, True, False]
    assert result.clipped_high.tolist() == [False, False, True, False, False, False]


@PROPERTY
@given(batches(one_advantage=False))
def test_equals_the_oracle(tokens):
    terms = make_terms(tokens)
    result = clip_cov(terms, clip_low=0.2, clip_high=0.28)
    expected = [oracle(t) for t in tokens]
    assert result.loss.tolist() == near([e[0] for e in expected])
    assert gradients(terms, result)[1] == near([e[1] for e in expected])
    assert result.clipped_low.tolist() == [e[2] for e in expected]
    assert result.clipped_high.tolist() == [e[3] for e in expected]


def test_bad_arguments_are_named():
    for low, high in ((-0.1, 0.2), (1.0, 0.2), (0.2, -0.1), (math.nan, 0.2), (0.2, math.nan)):
        with pytest.raises(ValueError, match="expected 0 <= clip_low < 1 and clip_high >= 0, but got"):
            clip_cov(make_terms([Token()]), clip_low=low, clip_high=high)
