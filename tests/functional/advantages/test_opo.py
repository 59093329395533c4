import math

import pytest
from functional.judged_maker import by_group, known, make_judged, rewards_or_none
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_lightning.functional.advantages.opo import opo

PROPERTY = settings(max_examples=80, deadline=None, derandomize=True, database=None)


def test_golden_numbers():
    # Lengths 1 and 3: baseline (1 * 1 + 3 * 0) / 4. The invalid sample's 100 tokens do not count.
    got = opo(make_judged([[1.0, 0.0, None]], lengths=[[1, 3, 100]]))
    assert got.tolist() == [[0.75, -0.25, 0.0]]


def test_equal_lengths_give_the_mean():
    assert opo(make_judged([[1.0, 0.0, 0.0, 3.0]])).tolist() == [[0.0, -1.0, -1.0, 2.0]]


@PROPERTY
@given(rewards_or_none, st.randoms(use_true_random=False))
def test_equals_the_oracle(rewards, random):
    lengths = [[random.randint(0, 40) + (i == 0) for i, _ in enumerate(row)] for row in rewards]
    got = opo(make_judged(rewards, lengths=lengths)).tolist()
    for row, sizes, line in zip(rewards, lengths, got, strict=True):
        pairs = [(r, n) for r, n in zip(row, sizes, strict=True) if r is not None]
        total = sum(n for _, n in pairs)
        baseline = math.fsum(r * n for r, n in pairs) / total if total else 0.0
        expected = by_group([row], lambda i, group, b=baseline, t=total: group[i] - b if t else 0.0)[0]
        assert line == pytest.approx(expected, rel=1e-9, abs=1e-9)
        if len(known(row)) >= 2 and total:
            assert math.fsum(a * n for a, n in zip(line, sizes, strict=True)) == pytest.approx(0, abs=1e-6)


def test_lengths():
    assert opo(make_judged([[1.0, 0.0]], lengths=[[0, 0]])).tolist() == [[0.0, 0.0]]
    assert opo(make_judged([[1.0, 0.0]], lengths=[[0, 5]])).tolist() == [[1.0, 0.0]]
    with pytest.raises(ValueError, match="expected lengths >= 0, but got -2"):
        opo(make_judged([[1.0, 0.0]], lengths=[[5, -2]]))
