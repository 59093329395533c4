import math

import pytest
from functional.terms_maker import PROPERTY, Token, batches, gradients, make_terms, near
from hypothesis import given
from hypothesis import strategies as st

from grpo_lightning.functional.surrogates import cispo


@pytest.mark.parametrize(
    ("ratio", "advantage", "settings", "weight"),
    [
        (1.0, 2.0, {}, 1.0),
        (4.0, 2.0, {}, 4.0),
        (7.0, 2.0, {}, 5.0),  # the default cap, 1 + 4
        (7.0, -2.0, {}, 5.0),
        (0.1, -2.0, {}, 0.1),  # no lower bound by default
        (0.1, -2.0, {"clip_low": 0.2}, 0.8),
        (1.5, 2.0, {"clip_high": 0.2}, 1.2),
    ],
)
def test_golden_numbers(ratio, advantage, settings, weight):
    # The log-probability is -3, so the loss is 3 w A and its gradient -w A, in the log-probability alone.
    terms = make_terms([Token(-3.0, math.log(ratio), advantage, 0.5)])
    result = cispo(terms, **settings)
    assert result.loss.tolist() == near([3 * weight * advantage])
    assert gradients(terms, result) == [near([-weight * advantage]), [0.0]]
    assert not result.clipped_low.any()
    assert not result.clipped_high.any()


@PROPERTY
@given(batches(one_advantage=False), st.floats(0, 2), st.one_of(st.none(), st.floats(0, 0.9)))
def test_equals_the_oracle(tokens, high, low):
    terms = make_terms(tokens)
    result = cispo(terms, clip_high=high, clip_low=low)
    ratios = [min(max(math.exp(t.log_ratio), 0 if low is None else 1 - low), 1 + high) for t in tokens]
    slopes = [-r * t.advantage if t.weight else 0.0 for r, t in zip(ratios, tokens, strict=True)]
    assert result.loss.tolist() == near([s * t.logprob for s, t in zip(slopes, tokens, strict=True)])
    assert gradients(terms, result)[0] == near(slopes)


def test_bad_arguments_are_named():
    terms = make_terms([Token()])
    for high in (-0.1, math.nan):
        with pytest.raises(ValueError, match="expected clip_high >= 0, but got"):
            cispo(terms, clip_high=high)
    for low in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="expected 0 <= clip_low < 1 or None, but got"):
            cispo(terms, clip_low=low)
