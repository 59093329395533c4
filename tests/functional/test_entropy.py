import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_lightning.functional.entropy import (
    active_entropy_coefficient,
    adaptive_entropy_coefficient,
    high_entropy_marks,
)

PROPERTY = settings(max_examples=100, deadline=None, derandomize=True, database=None)


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("coefficient", "observed", "expected", "active"),
    [
        (0.01, 0.19, 0.015, 0.01),  # below the target: up by 0.005, and in the loss
        (0.01, 0.20, 0.015, 0.01),  # equality counts as below
        (0.01, 0.21, 0.005, 0.0),  # above: down, and out of the loss
        (0.0, 0.21, 0.0, 0.0),  # never below the lower bound
        (0.018, 0.1, 0.02, 0.018),  # never above the upper
        (0.5, 0.1, 0.02, 0.5),  # from outside back to the bound
        (-0.5, 3.0, 0.0, 0.0),
    ],
)
def test_golden_coefficients(coefficient, observed, expected, active):
    after = adaptive_entropy_coefficient(coefficient, observed, target=0.2, step=0.005, high=0.02)
    assert after == pytest.approx(expected, rel=1e-14, abs=1e-17)
    assert active_entropy_coefficient(coefficient, observed, target=0.2) == active


@PROPERTY
@given(st.floats(0, 1), st.floats(0, 10), st.floats(0, 10), st.floats(1e-6, 2))
def test_coefficient_moves_by_at_most_a_step_within_its_bounds(coefficient, observed, target, step):
    after = adaptive_entropy_coefficient(coefficient, observed, target=target, step=step)
    assert 0 <= after <= 1
    assert abs(after - coefficient) <= step * (1 + 1e-9)
    assert (after - coefficient) * (target - observed) >= 0


def test_bonus_holds_the_entropy_that_would_fall():
    # A policy whose entropy falls by 0.02 each step and rises by the bonus: without a bonus it ends at 0.
    entropy, coefficient, seen = 1.0, 0.0, []
    for _ in range(3000):
        active = active_entropy_coefficient(coefficient, entropy, target=0.4)
        coefficient = adaptive_entropy_coefficient(coefficient, entropy, target=0.4, step=0.001)
        entropy = max(entropy - 0.02 + active, 0.0)
        seen.append(entropy)
    assert sum(seen[1000:]) / 2000 == pytest.approx(0.4, abs=0.05)
    assert min(seen) > 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coefficient": math.nan}, "expected a finite coefficient, but got nan"),
        ({"observed": math.nan}, "expected a finite observed entropy, but got nan"),
        ({"observed": math.inf}, "expected a finite observed entropy, but got inf"),
        ({"target": -0.1}, "expected a finite target >= 0, but got -0.1"),
        ({"step": 0.0}, "expected a finite step > 0, but got 0.0"),
        ({"low": 0.2, "high": 0.1}, "expected finite 0 <= low <= high, but got low 0.2 and high 0.1"),
        ({"low": -0.1}, "expected finite 0 <= low <= high, but got low -0.1"),
    ],
)
def test_wrong_settings_of_the_coefficient_are_named(change, message):
    right = {"coefficient": 0.1, "observed": 1.0, "target": 1.0, "step": 0.01}
    with pytest.raises(ValueError, match=message):
        adaptive_entropy_coefficient(**(right | change))
    if {"coefficient", "observed", "target"} & change.keys():
        values = right | change
        with pytest.raises(ValueError, match=message):
            active_entropy_coefficient(values["coefficient"], values["observed"], target=values["target"])


def marks(entropies, weights=None, **kwargs):
    weights = [1.0] * len(entropies) if weights is None else weights
    return [int(mark) for mark in high_entropy_marks(f64(entropies), f64(weights), **kwargs).tolist()]


@pytest.mark.parametrize(
    ("entropies", "share", "expected"),
    [
        # 1 + floor(0.2 * 4) = 1, 1 + floor(0.2 * 5) = 2.
        ([0.1, 0.5, 0.3, 0.2, 0.4], 0.2, [0, 1, 0, 0, 0]),
        ([0.1, 0.5, 0.3, 0.2, 0.4, 0.0], 0.2, [0, 1, 0, 0, 1, 0]),
        # 1 + floor(0.5 * 3) = 2; one token of the second place more ties with it.
        ([0.3, 0.5, 0.3, 0.1], 0.5, [1, 1, 1, 0]),
        ([0.3, 0.3, 0.3], 0.2, [1, 1, 1]),
        ([0.1, 0.2, 0.3], 1.0, [1, 1, 1]),
        ([0.1, 0.2, 0.3], 1e-6, [0, 0, 1]),
        ([0.7], 0.2, [1]),
        ([0.0, 0.0], 0.5, [1, 1]),
        ([math.inf, 0.1], 0.2, [1, 0]),
    ],
)
def test_golden_marks(entropies, share, expected):
    assert marks(entropies, share=share) == expected


def test_a_fifth_is_the_default():
    assert sum(marks([i / 101 for i in range(101)])) == 21


@pytest.mark.parametrize("percent", range(1, 101))
def test_number_of_marks_is_exact(percent):
    # 0.29 * 100 is 28.999999999999996 in floating point.
    assert sum(marks([float(i) for i in range(101)], share=percent / 100)) == 1 + percent


token = st.tuples(st.floats(0, 5), st.one_of(st.just(0.0), st.floats(0.001, 1)))
tokens = st.lists(token, min_size=1, max_size=20)
shares = st.integers(1, 100)


def oracle(values, percent):
    """Tokens that fewer than `k` counted ones exceed."""
    counted = [e for e, w in values if w != 0]
    k = 1 + math.floor(Fraction(percent, 100) * (len(counted) - 1))
    return [int(w != 0 and sum(other > e for other in counted) < k) for e, w in values]


@PROPERTY
@given(tokens, shares, st.randoms(use_true_random=False))
def test_equals_the_oracle_in_any_order(values, percent, random):
    expected = oracle(values, percent)
    assert marks(*map(list, zip(*values, strict=True)), share=percent / 100) == expected
    order = list(range(len(values)))
    random.shuffle(order)
    shuffled = marks(*map(list, zip(*[values[i] for i in order], strict=True)), share=percent / 100)
    assert shuffled == [expected[i] for i in order]


@PROPERTY
@given(st.lists(st.integers(0, 50), min_size=1, max_size=30), st.sampled_from([0.5, 0.25, 0.125, 0.75, 1.0]))
def test_equals_the_interpolated_quantile(entropies, share):
    # Numbers that floating point holds exactly, so that the quantile lies where it should.
    threshold = torch.quantile(f64(entropies), 1 - share)
    assert marks(entropies, share=share) == [int(e >= threshold) for e in entropies]


@pytest.mark.parametrize("junk", [math.nan, math.inf, 9.0])
def test_tokens_of_weight_0_never_matter(junk):
    assert marks([junk, 0.1, 0.5, junk, 0.3], [0.0, 1.0, 0.2, 0.0, 1.0], share=0.5) == [0, 0, 1, 0, 1]


def test_nothing_counts():
    assert marks([math.nan, 1.0], [0.0, 0.0]) == [0, 0]
    assert marks([]) == []


def test_marks_carry_no_gradient():
    entropy = f64([0.1, 0.2]).requires_grad_()
    chosen = high_entropy_marks(entropy, torch.ones(2))
    assert chosen.dtype == torch.bool
    assert not chosen.requires_grad


def test_wrong_input_of_marks_is_named():
    with pytest.raises(ValueError, match="expected entropies, but got NaN for a token that counts"):
        marks([0.1, math.nan])
    with pytest.raises(ValueError, match=r"expected equal shapes, but got \(2,\) and \(1,\)"):
        high_entropy_marks(torch.zeros(2), torch.ones(1))
    for share in (0.0, -0.2, 1.1, math.nan):
        with pytest.raises(ValueError, match=rf"expected a share in \(0, 1\], but got {share}"):
            marks([0.1], share=share)
