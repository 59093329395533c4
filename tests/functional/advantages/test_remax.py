import math

import pytest
from functional.judged_maker import by_group, eighths, make_judged, rewards_or_none
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_lightning.functional.advantages.remax import remax

PROPERTY = settings(max_examples=80, deadline=None, derandomize=True, database=None)


def test_golden_numbers():
    # Equal rewards push as well, where the greedy answer differs.
    got = remax(make_judged([[1.0, 0.0, None], [1.0, 1.0, 1.0]], greedy=[0.25, 0.5]))
    assert got.tolist() == [[0.75, -0.25, 0.0], [0.5, 0.5, 0.5]]


@PROPERTY
@given(rewards_or_none, st.lists(eighths, min_size=4, max_size=4))
def test_equals_the_oracle(rewards, greedy):
    greedy = greedy[: len(rewards)]
    pairs = zip(rewards, greedy, strict=True)
    expected = [by_group([group], lambda i, group, g=g: group[i] - g)[0] for group, g in pairs]
    assert remax(make_judged(rewards, greedy=greedy)).tolist() == expected


@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_a_prompt_without_a_greedy_answer_is_refused(bad):
    message = "expected the reward of a greedy answer to each of the 3 prompts, which remax compares with, but 1 have"
    with pytest.raises(ValueError, match=message):
        remax(make_judged([[1.0, 0.0], [1.0, 0.0], [None, None]], greedy=[0.0, bad, 0.0]))
    # Nothing of it is valid: none is needed.
    assert remax(make_judged([[1.0, 0.0], [None, None]], greedy=[0.0, bad])).tolist() == [[1.0, 0.0], [0.0, 0.0]]
