import math

import pytest
import torch
from functional.terms_maker import PROPERTY, near
from hypothesis import given
from hypothesis import strategies as st

from grpo_lightning.functional.marks import clip_cov_marks, covariance, kl_cov_marks

number = st.integers(-8000, 8000).map(lambda i: i / 1000)
pairs = st.lists(st.tuples(number, number), min_size=1, max_size=30)
keyed = st.lists(
    st.tuples(number, st.floats(0, 1, exclude_max=True)), min_size=1, max_size=30, unique_by=(lambda p: p[1])
)
shares = st.integers(1, 100).map(lambda i: i / 100)


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def count(share, tokens):
    # Shares are whole hundredths.
    return max(1, round(share * 100) * tokens // 100)


def test_golden_covariance():
    # Means -2 and 1: (1)(1), (-1)(-1), (0)(0).
    assert covariance(f64([-1.0, -3.0, -2.0]), f64([2.0, 0.0, 1.0])).tolist() == [1.0, 1.0, 0.0]


@PROPERTY
@given(pairs)
def test_covariance_equals_the_oracle(values):
    logprobs, advantages = zip(*values, strict=True)
    p, a = (math.fsum(v) / len(v) for v in (logprobs, advantages))
    expected = [(x - p) * (y - a) for x, y in values]
    assert covariance(f64(logprobs), f64(advantages)).tolist() == near(expected)


def test_covariance_has_no_gradient():
    assert not covariance(torch.zeros(2, requires_grad=True), torch.ones(2, requires_grad=True)).requires_grad


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        # Candidates of [1, 5] are tokens 1, 2, 3, 5 (both ends belong to it); by key: 5, 2, 1, 3.
        (0.01, [False, False, False, False, False, True]),  # 0.06 tokens: at least one
        (0.34, [False, False, True, False, False, True]),  # 2.04
        (0.49, [False, False, True, False, False, True]),  # 2.94, rounded down
        (0.5, [False, True, True, False, False, True]),
        (1.0, [False, True, True, True, False, True]),  # six wanted, four there
    ],
)
def test_golden_clip_cov_marks(share, expected):
    values, keys = f64([0.9, 1.0, 2.0, 5.0, 5.1, 3.0]), f64([0.0, 0.6, 0.5, 0.7, 0.1, 0.2])
    assert clip_cov_marks(values, share=share, keys_N=keys).tolist() == expected


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (0.01, [False, False, True, False]),
        (0.5, [True, False, True, False]),
        (0.74, [True, False, True, False]),
        (0.75, [True, True, True, False]),  # of the equal ones the first
        (1.0, [True, True, True, True]),
    ],
)
def test_golden_kl_cov_marks(share, expected):
    assert kl_cov_marks(f64([2.0, -1.0, 7.0, -1.0]), share=share).tolist() == expected


@PROPERTY
@given(keyed, shares, st.floats(-5, 0), st.floats(0.1, 5))
def test_clip_cov_marks_equal_the_oracle(values, share, low, high):
    candidates = sorted((key, i) for i, (v, key) in enumerate(values) if low <= v <= high)
    chosen = {i for _, i in candidates[: count(share, len(values))]}
    got = clip_cov_marks(
        f64([v for v, _ in values]), share=share, low=low, high=high, keys_N=f64([k for _, k in values])
    )
    assert {i for i, m in enumerate(got.tolist()) if m} == chosen


@PROPERTY
@given(st.lists(number, min_size=1, max_size=30), shares)
def test_kl_cov_marks_equal_the_oracle(values, share):
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    got = kl_cov_marks(f64(values), share=share).tolist()
    assert {i for i, m in enumerate(got) if m} == set(order[: count(share, len(values))])


@PROPERTY
@given(keyed, shares, st.randoms(use_true_random=False))
def test_order_of_tokens_does_not_matter(values, share, random):
    order = list(range(len(values)))
    random.shuffle(order)
    cov, keys = f64([v for v, _ in values]), f64([k for _, k in values])
    marks = clip_cov_marks(cov, share=share, low=-1.0, high=4.0, keys_N=keys)
    assert torch.equal(marks[order], clip_cov_marks(cov[order], share=share, low=-1.0, high=4.0, keys_N=keys[order]))
    if len(set(cov.tolist())) == len(values):
        assert torch.equal(kl_cov_marks(cov, share=share)[order], kl_cov_marks(cov[order], share=share))


def test_shares_of_many_tokens():
    # 0.0002 of 100 000 is 20, 0.002 is 200, and 0.29 of 100 is 29 although the product is a little less.
    cov, keys = torch.linspace(1, 5, 100_000), torch.linspace(0, 0.9, 100_000)
    marks = clip_cov_marks(cov, keys_N=keys)
    assert marks.nonzero().flatten().tolist() == list(range(20))
    assert kl_cov_marks(cov).nonzero().flatten().tolist() == list(range(99_800, 100_000))
    assert int(kl_cov_marks(cov[:100], share=0.29).sum()) == 29


def test_few_tokens_and_no_candidates():
    one = f64([0.5])
    assert clip_cov_marks(one, keys_N=f64([0.5])).tolist() == [False]
    assert kl_cov_marks(one).tolist() == [True]
    none = f64([])
    assert clip_cov_marks(none, keys_N=none).shape == kl_cov_marks(none).shape == (0,)
    assert covariance(f64([-3.0]), f64([2.0])).tolist() == [0.0]


def test_wrong_input_is_named():
    two = torch.zeros(2)
    for share in (0.0, -0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="expected 0 < share <= 1, but got"):
            clip_cov_marks(two, share=share, keys_N=two)
        with pytest.raises(ValueError, match="expected 0 < share <= 1, but got"):
            kl_cov_marks(two, share=share)
    for low, high in ((1.0, 1.0), (2.0, 1.0), (math.nan, 1.0), (0.0, math.nan)):
        with pytest.raises(ValueError, match="expected low < high, but got low"):
            clip_cov_marks(two, low=low, high=high, keys_N=two)
    for key in (1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"expected keys_N in \[0, 1\), but got others"):
            clip_cov_marks(two, keys_N=torch.tensor([0.0, key]))
    with pytest.raises(ValueError, match=r"expected tensors of one shape \[N\], but got shapes"):
        clip_cov_marks(two, keys_N=torch.zeros(1))
    with pytest.raises(ValueError, match=r"expected tensors of one shape \[N\], but got shapes"):
        covariance(two, torch.zeros(1))
    for bad in (-math.inf, math.nan):
        with pytest.raises(ValueError, match="expected finite logprobs, but got 1 that are not"):
            covariance(torch.tensor([bad, 0.0]), two)
        with pytest.raises(ValueError, match="expected finite advantages, but got 1 that are not"):
            covariance(two, torch.tensor([bad, 0.0]))
