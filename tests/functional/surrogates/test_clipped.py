import math

import pytest
import torch
from functional.terms_maker import PROPERTY, Token, batches, gradients, make_terms, near
from hypothesis import assume, given
from hypothesis import strategies as st

from grpo_lightning.functional.surrogates import clipped

clips = st.tuples(st.floats(0, 0.9), st.floats(0, 2))
bounds = st.one_of(st.none(), st.floats(0.01, 1))


def oracle(t, low, high, dual, delta):
    """Loss and gradient in the log-ratio, from the formula with minima and maxima."""
    if t.weight == 0:
        return 0.0, 0.0, False, False
    r = math.exp(t.log_ratio)
    # Value and derivative by log r, of the ratio, of the bounded one and of the clipped one.
    free = (r, r) if delta is None or r < delta else (delta, 0.0)
    edge = (min(max(r, 1 - low), 1 + high), 0.0 if r < 1 - low or r > 1 + high else r)
    value, slope = min((free[0] * t.advantage, free[1]), (edge[0] * t.advantage, edge[1]), key=lambda o: o[0])
    if free[0] * t.advantage == edge[0] * t.advantage:
        slope = edge[1]
    if dual is not None and t.advantage < 0 and dual * t.advantage > value:
        value, slope = dual * t.advantage, 0.0
    stopped = slope == 0 and t.advantage != 0
    return -value, -slope * t.advantage, stopped and r < 1, stopped and r > 1


@pytest.mark.parametrize(
    ("ratio", "advantage", "settings", "loss", "gradient", "low", "high"),
    [
        (0.5, 1.0, {}, -0.5, -0.5, False, False),
        (1.0, 2.0, {}, -2.0, -2.0, False, False),
        (1.5, 2.0, {}, -2.4, 0.0, False, True),
        (0.5, -1.0, {}, 0.8, 0.0, True, False),
        (1.5, -1.0, {}, 1.5, 1.5, False, False),
        (1.25, 1.0, {"clip_high": 0.28}, -1.25, -1.25, False, False),
        (0.85, -1.0, {"clip_low": 0.1}, 0.9, 0.0, True, False),
        (5.0, -2.0, {}, 10.0, 10.0, False, False),  # nothing bounds a bad token
        (5.0, -2.0, {"dual_clip": 3.0}, 6.0, 0.0, False, True),
        (2.0, -2.0, {"dual_clip": 3.0}, 4.0, 4.0, False, False),
        (5.0, 2.0, {"dual_clip": 3.0}, -2.4, 0.0, False, True),
        (5.0, -2.0, {"delta": 4.0}, 8.0, 0.0, False, True),
        (3.0, -2.0, {"delta": 4.0}, 6.0, 6.0, False, False),
        (5.0, 2.0, {"delta": 4.0}, -2.4, 0.0, False, True),
        (0.5, -2.0, {"delta": 4.0}, 1.6, 0.0, True, False),
        (5.0, -2.0, {"delta": 4.0, "dual_clip": 3.0}, 6.0, 0.0, False, True),  # the tighter one
        (5.0, -2.0, {"delta": 3.0, "dual_clip": 4.0}, 6.0, 0.0, False, True),
        (5.0, 0.0, {"delta": 3.0, "dual_clip": 4.0}, 0.0, 0.0, False, False),
    ],
)
def test_golden_numbers(ratio, advantage, settings, loss, gradient, low, high):
    terms = make_terms([Token(log_ratio=math.log(ratio), advantage=advantage, weight=0.5)])
    result = clipped(terms, **settings)
    assert result.loss.tolist() == near([loss])
    assert gradients(terms, result) == [[0.0], near([gradient])]
    assert (result.clipped_low.tolist(), result.clipped_high.tolist()) == ([low], [high])


@PROPERTY
@given(batches(one_advantage=False), clips, bounds, bounds)
def test_equals_the_oracle(tokens, clip, dual, delta):
    low, high = clip
    dual = None if dual is None else 1 + dual
    delta = None if delta is None else 1 + high + delta
    edges = [e for e in (1 - low, 1 + high, dual, delta, 1.0) if e is not None]
    # Exactly on an edge both gradients are right, and rounding decides the flags.
    tokens = [t for t in tokens if min(abs(math.exp(t.log_ratio) - e) for e in edges) > 1e-9]
    assume(tokens)
    terms = make_terms(tokens)
    result = clipped(terms, clip_low=low, clip_high=high, dual_clip=dual, delta=delta)
    expected = [oracle(t, low, high, dual, delta) for t in tokens]
    assert result.loss.tolist() == near([e[0] for e in expected])
    assert gradients(terms, result)[1] == near([e[1] for e in expected])
    assert result.clipped_low.tolist() == [e[2] for e in expected]
    assert result.clipped_high.tolist() == [e[3] for e in expected]


def test_bounds_take_ratios_beyond_float32():
    for kwargs in ({"dual_clip": 3.0}, {"delta": 3.0}):
        terms = make_terms([Token(log_ratio=200.0, advantage=-2.0)], torch.float32)
        result = clipped(terms, **kwargs)
        assert result.loss.tolist() == [6.0]
        assert gradients(terms, result)[1] == [0.0]


def test_bad_arguments_are_named():
    terms = make_terms([Token()])
    for low, high in ((-0.1, 0.2), (1.0, 0.2), (0.2, -0.1), (math.nan, 0.2), (0.2, math.nan)):
        with pytest.raises(ValueError, match="expected 0 <= clip_low < 1 and clip_high >= 0, but got"):
            clipped(terms, clip_low=low, clip_high=high)
    for dual_clip in (1.0, 0.5, math.nan):
        with pytest.raises(ValueError, match="expected dual_clip > 1, but got"):
            clipped(terms, dual_clip=dual_clip)
    for delta in (1.2, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"expected delta > 1 \+ clip_high = 1.2, but got"):
            clipped(terms, delta=delta)
