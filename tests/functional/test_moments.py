import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_lightning.functional.moments import Moments, merge_moments, moments

PROPERTY = settings(max_examples=100, deadline=None, derandomize=True, database=None)
numbers = st.lists(st.floats(-1e3, 1e3, width=32), min_size=0, max_size=25)


def oracle(values):
    """Exact arithmetic."""
    exact = [Fraction(v) for v in values]
    mean = sum(exact, Fraction(0)) / len(exact)
    return [len(exact), float(mean), float(sum((v - mean) ** 2 for v in exact)), min(values), max(values)]


def of(values):
    return moments(torch.tensor(values, dtype=torch.float64))


def test_golden_numbers():
    # Mean 2.5, squared deviations 2.25 + 0.25 + 0.25 + 2.25.
    m = of([4.0, 1.0, 3.0, 2.0])
    assert m.stack().tolist() == [4.0, 2.5, 5.0, 1.0, 4.0]
    assert m.std.item() == math.sqrt(1.25)


def test_merge_golden_numbers():
    # {1, 2} and {6}: mean 3, squared deviations 4 + 1 + 9.
    merged = merge_moments(of([1.0, 2.0]), of([6.0]))
    assert merged.stack().tolist() == [3.0, 3.0, 14.0, 1.0, 6.0]


def test_empty():
    m = moments(torch.empty(0))
    assert m.stack().tolist() == [0.0, 0.0, 0.0, math.inf, -math.inf]
    assert m.std.item() == 0.0
    assert merge_moments(m, m).stack().tolist() == [0.0, 0.0, 0.0, math.inf, -math.inf]
    some = of([3.0, 5.0])
    assert merge_moments(m, some).stack().tolist() == some.stack().tolist() == merge_moments(some, m).stack().tolist()


def test_stack_and_unstack_are_inverse():
    m = of([1.0, 2.0, 4.0])
    assert Moments.unstack(m.stack()) == m


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_any_shape_and_dtype_becomes_float64_without_gradient(dtype):
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=dtype, requires_grad=True)
    m = moments(values)
    assert m.stack().tolist() == [4.0, 2.5, 5.0, 1.0, 4.0]
    assert m.stack().dtype == torch.float64
    assert not m.stack().requires_grad


@PROPERTY
@given(numbers.filter(len))
def test_equals_exact_arithmetic(values):
    got, expected = of(values).stack().tolist(), oracle(values)
    assert got[0] == expected[0]
    assert got[1:3] == pytest.approx(expected[1:3], rel=1e-9, abs=1e-9)
    assert got[3:] == expected[3:]


@PROPERTY
@given(st.lists(numbers, min_size=1, max_size=6).filter(lambda parts: any(parts)), st.randoms(use_true_random=False))
def test_merging_any_split_in_any_order_equals_the_whole(parts, random):
    random.shuffle(parts)
    total = moments(torch.empty(0))
    for part in parts:
        total = merge_moments(total, of(part))
    got, expected = total.stack().tolist(), oracle([v for part in parts for v in part])
    assert got[0] == expected[0]
    assert got[1:3] == pytest.approx(expected[1:3], rel=1e-9, abs=1e-9)
    assert got[3:] == expected[3:]


@pytest.mark.parametrize("spread", [1e-9, 1e-6, 1e-4])
def test_small_spreads_around_one_survive_merging(spread):
    # +-spread in turn: variance spread^2. Merged one by one.
    total = moments(torch.empty(0))
    for i in range(1000):
        total = merge_moments(total, of([1 + spread * (-1) ** i]))
    assert total.std.item() == pytest.approx(spread, rel=1e-6)
