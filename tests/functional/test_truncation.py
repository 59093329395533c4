import math

import pytest
import torch
from fakes import likeliest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_lightning.functional.truncation import kept_counts, truncated

PROPERTY = settings(max_examples=100, deadline=None, derandomize=True, database=None)
SORTED = [0.4, 0.3, 0.15, 0.1, 0.05]


def count(probabilities, **bounds):
    return int(kept_counts(torch.tensor([probabilities], dtype=torch.float64), **bounds))


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ({}, 5),
        # 0.4 is less than 0.5, 0.7 is enough.
        ({"top_p": 0.5}, 2),
        ({"top_p": 0.39}, 1),
        ({"top_p": 0.41}, 2),
        ({"top_p": 0.96}, 5),
        ({"top_p": 1e-9}, 1),
        ({"top_k": 1}, 1),
        ({"top_k": 4}, 4),
        ({"top_k": 5}, 5),
        ({"top_k": 99}, 5),
        # Of the three that stay, 0.85 in all, two hold 0.7 / 0.85 = 0.82.
        ({"top_k": 3, "top_p": 0.82}, 2),
        ({"top_k": 3, "top_p": 0.83}, 3),
        # Odds of 1 moved to odds of 3 either way: masses of 0.75 and 0.25.
        ({"top_p": 0.5, "tilt": math.log(3)}, 3),
        ({"top_p": 0.5, "tilt": -math.log(3)}, 1),
        # 0.1 is within a factor of 2 of 0.15, and 0.3 of it.
        ({"top_k": 3, "tilt": math.log(2)}, 4),
        ({"top_k": 3, "tilt": -math.log(1.9)}, 2),
    ],
)
def test_golden_numbers(bounds, expected):
    assert count(SORTED, **bounds) == expected


def test_tokens_that_tie_with_the_last_of_top_k_stay():
    assert count([0.4, 0.2, 0.2, 0.2], top_k=2) == 4


@pytest.mark.parametrize("bounds", [{"top_p": 0.0}, {"top_p": 1.1}, {"top_p": math.nan}, {"top_k": -1}])
def test_bounds_out_of_range_are_refused(bounds):
    with pytest.raises(ValueError, match="expected"):
        kept_counts(torch.tensor([SORTED]), **bounds)


# Far enough apart that none ties with another after rounding.
logits = st.integers(-8000, 8000).map(lambda i: i / 1000)
distributions = st.lists(logits, min_size=1, max_size=12, unique=True)


@PROPERTY
@given(logits=distributions, top_p=st.floats(0.01, 1), top_k=st.integers(0, 14), data=st.data())
def test_against_a_loop(logits, top_p, top_k, data):
    logits = data.draw(st.permutations(logits))
    logp = torch.tensor([logits], dtype=torch.float64).log_softmax(-1)
    result = truncated(logp, top_p=top_p, top_k=top_k)[0].tolist()
    probabilities = logp[0].exp().tolist()
    kept, mass = likeliest(probabilities, top_p, top_k)
    expected = [math.log(p / mass) if i in kept else -math.inf for i, p in enumerate(probabilities)]
    assert result == pytest.approx(expected, abs=1e-12)
    assert math.fsum(map(math.exp, result)) == pytest.approx(1, abs=1e-12)


@PROPERTY
@given(logits=distributions, top_p=st.floats(0.01, 1), top_k=st.integers(0, 14), tilt=st.floats(0, 3))
def test_a_tilt_only_widens(logits, top_p, top_k, tilt):
    probabilities = sorted(torch.tensor(logits, dtype=torch.float64).softmax(-1).tolist(), reverse=True)
    counts = [count(probabilities, top_p=top_p, top_k=top_k, tilt=x) for x in (-tilt, 0.0, tilt)]
    assert counts == sorted(counts)


def test_banned_tokens_stay_out():
    logp = torch.tensor([[math.log(0.75), math.log(0.25), -math.inf]])
    assert truncated(logp, top_k=3)[0].exp().tolist() == pytest.approx([0.75, 0.25, 0])
    assert truncated(logp, top_p=0.999)[0].exp().tolist() == pytest.approx([0.75, 0.25, 0])
