from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_lightning.functional import pass_at_k

PROPERTY = settings(max_examples=200, deadline=None, derandomize=True, database=None)
cases = st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n), st.integers(1, n)))


def oracle(correct, samples, k):
    """Share of all subsets of size k with at least one correct sample."""
    subsets = list(combinations([number < correct for number in range(samples)], k))
    return sum(any(subset) for subset in subsets) / len(subsets)


@pytest.mark.parametrize(
    ("correct", "samples", "k", "expected"),
    [
        (0, 8, 4, 0.0),
        (8, 8, 1, 1.0),
        (3, 8, 1, 3 / 8),
        # 1 - C(6, 2) / C(8, 2) = 1 - 15 / 28
        (2, 8, 2, 13 / 28),
        # 1 - C(9, 5) / C(10, 5) = 1 - 126 / 252
        (1, 10, 5, 0.5),
        # Fewer wrong samples than k.
        (6, 10, 5, 1.0),
        (1, 200, 100, 0.5),
    ],
)
def test_golden_numbers(correct, samples, k, expected):
    assert pass_at_k(correct, samples, k) == expected


@pytest.mark.parametrize("samples", range(1, 10))
def test_equals_the_count_of_subsets(samples):
    for correct in range(samples + 1):
        for k in range(1, samples + 1):
            assert pass_at_k(correct, samples, k) == oracle(correct, samples, k)


@PROPERTY
@given(cases)
def test_is_a_probability_and_certain_only_where_it_must_be(case):
    correct, samples, k = case
    value = pass_at_k(correct, samples, k)
    assert 0 <= value <= 1
    assert (value == 0) == (correct == 0)
    if samples - correct < k:
        assert value == 1


@PROPERTY
@given(cases)
def test_grows_with_k_and_with_correct_samples(case):
    correct, samples, k = case
    value = pass_at_k(correct, samples, k)
    if k < samples:
        assert pass_at_k(correct, samples, k + 1) >= value
    if correct < samples:
        assert pass_at_k(correct + 1, samples, k) >= value


@PROPERTY
@given(cases)
def test_one_sample_is_the_mean_and_all_samples_are_any(case):
    correct, samples, _ = case
    assert pass_at_k(correct, samples, 1) == correct / samples
    assert pass_at_k(correct, samples, samples) == float(correct > 0)


@pytest.mark.parametrize(("samples", "k", "chance"), [(12, 3, 0.25), (9, 9, 0.5), (20, 2, 0.03)])
def test_is_unbiased(samples, k, chance):
    from math import comb

    mean = sum(
        comb(samples, c) * chance**c * (1 - chance) ** (samples - c) * pass_at_k(c, samples, k)
        for c in range(samples + 1)
    )
    assert mean == pytest.approx(1 - (1 - chance) ** k, rel=1e-12)


def test_small_chances_keep_their_digits():
    # 1 - (1 - 1e-17) would be 0.
    assert pass_at_k(1, 10**17, 1) == 1e-17


@pytest.mark.parametrize(
    ("correct", "samples", "k", "message"),
    [
        (0, 4, 0, "expected k from 1 to the 4 samples, but got 0"),
        (0, 4, 5, "expected k from 1 to the 4 samples, but got 5"),
        (0, 0, 0, "expected k from 1 to the 0 samples, but got 0"),
        (5, 4, 2, "expected from 0 to 4 correct samples, but got 5"),
        (-1, 4, 2, "expected from 0 to 4 correct samples, but got -1"),
    ],
)
def test_bad_arguments_are_refused(correct, samples, k, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        pass_at_k(correct, samples, k)
