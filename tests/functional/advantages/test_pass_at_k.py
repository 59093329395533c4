import itertools
import math

import pytest
from functional.judged_maker import binary_or_none, make_judged, mean, std
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_lightning.functional.advantages import ESTIMATORS
from grpo_lightning.functional.advantages.pass_at_k import pass_at_k

PROPERTY = settings(max_examples=80, deadline=None, derandomize=True, database=None)


def oracle(group, k):
    """Every set of k, judged as GRPO judges samples; a sample has the mean of its sets."""
    valid = [i for i, r in enumerate(group) if r is not None]
    sets = list(itertools.combinations(valid, k))
    passed = [float(any(group[i] >= 1 for i in chosen)) for chosen in sets]
    if len(valid) < 2 or min(passed) == max(passed):
        return [0.0] * len(group)
    scores = [(p - mean(passed)) / std(passed) for p in passed]
    return [
        mean([s for s, chosen in zip(scores, sets, strict=True) if i in chosen]) if i in valid else 0.0
        for i, _ in enumerate(group)
    ]


def test_golden_numbers():
    # One right of four, k = 2: of 6 pairs 3 hold none, so fail = std = 1 / 2. Of a wrong sample's 3 pairs 2 fail.
    got = pass_at_k(make_judged([[1.0, 0.0, 0.0, 0.0]]), k=2)
    assert got.tolist()[0] == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3], rel=1e-15)


def test_with_fewer_wrong_samples_than_k_there_is_nothing_to_gain():
    assert pass_at_k(make_judged([[1.0, 0.0, 0.0, 1.0]]), k=3).tolist() == [[0.0] * 4]
    assert pass_at_k(make_judged([[1.0, 0.0, 0.0, 0.0]]), k=4).tolist() == [[0.0] * 4]


@PROPERTY
@given(binary_or_none, st.integers(1, 4))
def test_equals_the_mean_over_all_sets(rewards, k):
    rewards = [row for row in rewards if sum(r is not None for r in row) >= k]
    if rewards:
        for row, line in zip(rewards, pass_at_k(make_judged(rewards), k=k).tolist(), strict=True):
            assert line == pytest.approx(oracle(row, k), rel=1e-9, abs=1e-9)


@PROPERTY
@given(binary_or_none)
def test_k_of_1_is_the_standardised_success(rewards):
    judged = make_judged(rewards)
    expected = ESTIMATORS["group_std"](judged, std_floor=1e-300).tolist()
    for line, other in zip(pass_at_k(judged, k=1).tolist(), expected, strict=True):
        assert line == pytest.approx(other, rel=1e-9, abs=1e-9)


def test_success_is_a_threshold():
    judged = make_judged([[0.9, 0.5, 0.1, -3.0]])
    assert pass_at_k(judged, k=2, success_reward=0.9).tolist()[0] == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3])
    assert pass_at_k(judged, k=2).tolist() == [[0.0] * 4]


def test_large_groups_lose_nothing():
    got = pass_at_k(make_judged([[1.0] * 2 + [0.0] * 4094]), k=2048)
    # C(4094, 2048) / C(4096, 2048) = 2048 * 2047 / (4096 * 4095).
    fail = 2048 * 2047 / (4096 * 4095)
    assert got[0, 0].item() == pytest.approx(math.sqrt(fail / (1 - fail)), rel=1e-12)
    assert got.sum().item() == pytest.approx(0, abs=1e-9)


def test_wrong_input_is_named():
    judged = make_judged([[1.0, 0.0, 0.0], [1.0, 0.0, None]])
    with pytest.raises(ValueError, match="expected at least k = 3 valid samples in each group, but a group has 2"):
        pass_at_k(judged, k=3)
    with pytest.raises(ValueError, match="expected k >= 1 and a finite success_reward, but got 0 and 1"):
        pass_at_k(judged, k=0)
    with pytest.raises(ValueError, match="expected k >= 1 and a finite success_reward, but got 2 and nan"):
        pass_at_k(judged, k=2, success_reward=math.nan)
