"""The numbers of estimators that look at the rewards of one group: group_std, group_mean, leave_one_out, maxrl."""

import math

import pytest
import torch
from functional.judged_maker import by_group, eighths, grids, known, make_judged, mean, rewards_or_none, std
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_lightning.functional import group_advantages
from grpo_lightning.functional.advantages import ESTIMATORS, STD_FLOOR

PROPERTY = settings(max_examples=80, deadline=None, derandomize=True, database=None)
positive_or_none = grids(st.none() | eighths.map(abs) | eighths.map(abs))


def others(i, group):
    """Mean of the other samples, taken literally."""
    return mean([r for j, r in enumerate(group) if j != i and r is not None])


ORACLES = {
    "group_std": lambda i, group: (group[i] - mean(known(group))) / (std(known(group)) + STD_FLOOR),
    "group_mean": lambda i, group: group[i] - mean(known(group)),
    "leave_one_out": lambda i, group: group[i] - others(i, group),
    "maxrl": lambda i, group: (group[i] - mean(known(group))) / mean(known(group)) if any(known(group)) else 0.0,
}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # Rewards 1, 2, 6 (and one without): mean 3, squared deviations 4 + 1 + 9, population variance 14 / 3.
        ("group_std", [d / (math.sqrt(14 / 3) + 1e-4) for d in (-2.0, -1.0, 3.0)]),
        ("group_mean", [-2.0, -1.0, 3.0]),
        # The others' means: 8 / 2, 7 / 2, 3 / 2.
        ("leave_one_out", [-3.0, -1.5, 4.5]),
        ("maxrl", [-2 / 3, -1 / 3, 1.0]),
    ],
)
def test_golden_numbers(name, expected):
    advantages = ESTIMATORS[name](make_judged([[1.0, 2.0, None, 6.0]]))
    assert advantages.tolist()[0] == pytest.approx([expected[0], expected[1], 0.0, expected[2]], rel=1e-15)


@pytest.mark.parametrize("name", ["group_std", "group_mean", "leave_one_out"])
@PROPERTY
@given(rewards_or_none)
def test_equals_the_oracle(name, rewards):
    got = ESTIMATORS[name](make_judged(rewards)).tolist()
    for line, expected in zip(got, by_group(rewards, ORACLES[name]), strict=True):
        assert line == pytest.approx(expected, rel=1e-9, abs=1e-9)


@PROPERTY
@given(positive_or_none)
def test_maxrl_equals_the_oracle(rewards):
    got = ESTIMATORS["maxrl"](make_judged(rewards)).tolist()
    for line, expected in zip(got, by_group(rewards, ORACLES["maxrl"]), strict=True):
        assert line == pytest.approx(expected, rel=1e-9, abs=1e-9)


@PROPERTY
@given(rewards_or_none)
def test_group_std_is_group_advantages(rewards):
    judged = make_judged(rewards)
    assert torch.equal(ESTIMATORS["group_std"](judged), group_advantages(judged.rewards_PG, judged.valid_PG))


def test_maxrl_of_right_and_wrong():
    # One of four is right: mean 1 / 4, so 3 and -1. None is right: 0.
    got = ESTIMATORS["maxrl"](make_judged([[1.0, 0.0, 0.0, 0.0], [0.0] * 4]))
    assert got.tolist() == [[3.0, -1.0, -1.0, -1.0], [0.0] * 4]


def test_maxrl_refuses_negative_rewards():
    with pytest.raises(ValueError, match=r"expected rewards >= 0, which maxrl needs, but got -0\.5"):
        ESTIMATORS["maxrl"](make_judged([[1.0, -0.5]]))
    ESTIMATORS["maxrl"](make_judged([[1.0, 0.5, -0.5]], [[True, True, False]]))
