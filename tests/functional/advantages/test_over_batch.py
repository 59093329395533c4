"""The numbers of estimators that look at the whole batch: batch_std, reinforce_pp and reinforce_pp_baseline."""

import math

import pytest
from functional.judged_maker import by_group, compared, known, make_judged, mean, rewards_or_none, std
from hypothesis import given, settings

from grpo_lightning.functional.advantages import ESTIMATORS, STD_FLOOR

PROPERTY = settings(max_examples=80, deadline=None, derandomize=True, database=None)


def oracle(name, rewards):
    batch = compared(rewards)
    differences = [r - mean(known(group)) for group in rewards if len(known(group)) >= 2 for r in known(group)]
    if not batch:
        return [[0.0] * len(group) for group in rewards]
    if name == "batch_std":
        return by_group(rewards, lambda i, group: (group[i] - mean(known(group))) / (std(batch) + STD_FLOOR))
    if name == "reinforce_pp":
        return by_group(rewards, lambda i, group: (group[i] - mean(batch)) / (std(batch) + STD_FLOOR))
    centre, scale = mean(differences), std(differences) + STD_FLOOR
    return by_group(rewards, lambda i, group: (group[i] - mean(known(group)) - centre) / scale)


@pytest.mark.parametrize(
    ("name", "spread", "expected"),
    [
        # Rewards 0, 2 and 4, 6: mean 3, squared deviations 9 + 1 + 1 + 9, population variance 5.
        ("batch_std", math.sqrt(5), [[-1.0, 1.0], [-1.0, 1.0]]),
        ("reinforce_pp", math.sqrt(5), [[-3.0, -1.0], [1.0, 3.0]]),
        # Differences from the groups' means are -1 and 1: variance 1.
        ("reinforce_pp_baseline", 1.0, [[-1.0, 1.0], [-1.0, 1.0]]),
    ],
)
def test_golden_numbers(name, spread, expected):
    got = ESTIMATORS[name](make_judged([[0.0, 2.0], [4.0, 6.0]]), std_floor=0.5).tolist()
    assert got == [pytest.approx([d / (spread + 0.5) for d in row], rel=1e-15) for row in expected]


@pytest.mark.parametrize("name", ["batch_std", "reinforce_pp", "reinforce_pp_baseline"])
@PROPERTY
@given(rewards_or_none)
def test_equals_the_oracle(name, rewards):
    got = ESTIMATORS[name](make_judged(rewards)).tolist()
    for line, expected in zip(got, oracle(name, rewards), strict=True):
        assert line == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_reinforce_pp_compares_prompts():
    # All rewards of each group are equal: 0 and 1, mean and std of the batch 0.5.
    judged = make_judged([[0.0, 0.0], [1.0, 1.0]])
    assert ESTIMATORS["reinforce_pp"](judged, std_floor=0.5).tolist() == [[-0.5, -0.5], [0.5, 0.5]]
    assert ESTIMATORS["reinforce_pp_baseline"](judged).tolist() == [[0.0, 0.0], [0.0, 0.0]]
