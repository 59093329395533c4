import math

import pytest
import torch
from functional.judged_maker import eighths, make_judged, mean, rewards_or_none, std
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_lightning.functional.advantages import STD_FLOOR
from grpo_lightning.functional.advantages.gdpo import gdpo

PROPERTY = settings(max_examples=80, deadline=None, derandomize=True, database=None)


def z_scores(values):
    """Of those that are not None; 0 for the others."""
    some = [v for v in values if v is not None]
    return [0.0 if v is None else (v - mean(some)) / (std(some) + STD_FLOOR) for v in values]


def oracle(rewards, parts, weights):
    sums = []
    for group, cells in zip(rewards, parts, strict=True):
        valid = [r is not None for r in group]
        columns = [
            z_scores([cell[k] if v else None for cell, v in zip(cells, valid, strict=True)])
            for k, _ in enumerate(weights)
        ]
        lone = sum(valid) < 2
        sums.append(
            [
                None if lone or not v else math.fsum(w * c[i] for w, c in zip(weights, columns, strict=True))
                for i, v in enumerate(valid)
            ]
        )
    some = [s for row in sums for s in row if s is not None]
    if not some:
        return [[0.0] * len(row) for row in sums]
    return [[0.0 if s is None else (s - mean(some)) / (std(some) + STD_FLOOR) for s in row] for row in sums]


def test_golden_numbers():
    # Right 1, 1, 0, 0 and short 1, 0, 1, 0, each of mean and std 1 / 2; with a floor of 1 / 2 their scores are
    # +-1 / 2. With weights 2 and 1 the sums are 3, 1, -1, -3 halves: variance 5 / 4, std 1.118.
    parts = [[[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]]
    got = gdpo(make_judged([[3.0, 2.0, 1.0, 0.0]], parts=parts, weights=[2.0, 1.0]), std_floor=0.5)
    unit = math.sqrt(5 / 4) + 0.5
    assert got.tolist()[0] == pytest.approx([1.5 / unit, 0.5 / unit, -0.5 / unit, -1.5 / unit], rel=1e-15)


def test_different_rewards_of_one_sum_stay_different():
    # Sums are 1, 1, 1, 0. The second reward is rarer than the first, and so counts for more.
    parts = [[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]]
    first, same, second, none = gdpo(make_judged([[1.0, 1.0, 1.0, 0.0]], parts=parts)).tolist()[0]
    assert first == same
    assert second > first + 0.1 > none


@PROPERTY
@given(rewards_or_none, st.lists(st.floats(0.1, 3), min_size=3, max_size=3), st.randoms(use_true_random=False))
def test_equals_the_oracle(rewards, weights, random):
    parts = [
        [[random.randint(0, 2) / 2, *(random.choice([None, 0.0, 1.0, -2.5]) for _ in range(2))] for _ in row]
        for row in rewards
    ]
    got = gdpo(make_judged(rewards, parts=parts, weights=weights)).tolist()
    for line, expected in zip(got, oracle(rewards, parts, weights), strict=True):
        assert line == pytest.approx(expected, rel=1e-9, abs=1e-9)


@PROPERTY
@given(st.lists(eighths, min_size=2, max_size=6), st.integers(-9, 9), st.integers(1, 9))
def test_scale_and_shift_of_one_reward_do_not_matter(values, shift, scale):
    other = [float(i % 2) for i, _ in enumerate(values)]
    parts = [[list(cell) for cell in zip(values, other, strict=True)]]
    moved = [[[scale * v + shift, o] for (v, o) in parts[0]]]
    first, second = (gdpo(make_judged([values], parts=p, weights=[1.0, 2.0]), std_floor=1e-12) for p in (parts, moved))
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)


def test_wrong_input_is_named():
    for parts in ([[[None], [1.0]]], [[[], []]]):
        with pytest.raises(ValueError, match="expected single rewards of each valid sample, which gdpo compares, but"):
            gdpo(make_judged([[1.0, 0.0]], parts=parts))
    for weight in (math.nan, math.inf, 1e200):
        with pytest.raises(ValueError, match="expected finite weights of the single rewards, but got"):
            gdpo(make_judged([[1.0, 0.0]], weights=[weight]))
