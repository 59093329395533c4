import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_lightning.functional import group_advantages
from grpo_lightning.functional.advantages import STD_FLOOR

PROPERTY = settings(max_examples=80, deadline=None, derandomize=True, database=None)
# Eighths: sums and means of a few of them are exact or nearly so, and equal values are frequent.
rewards = st.integers(-40, 40).map(lambda i: i / 8)
groups = st.integers(1, 6).flatmap(
    lambda g: st.lists(st.lists(rewards, min_size=g, max_size=g), min_size=1, max_size=4)
)


def oracle(group: list[float], valid: list[bool], floor: float) -> list[float]:
    kept = [r for r, v in zip(group, valid, strict=True) if v]
    if not kept or max(kept) == min(kept):
        return [0.0] * len(group)
    mean = math.fsum(kept) / len(kept)
    std = math.sqrt(math.fsum((r - mean) ** 2 for r in kept) / len(kept))
    return [(r - mean) / (std + floor) if v else 0.0 for r, v in zip(group, valid, strict=True)]


def test_golden_numbers():
    # Mean 5, squared deviations 9 + 1 + 1 + 1 + 0 + 0 + 4 + 16 = 32, population variance 32 / 8, std 2.
    rewards_PG = torch.tensor([[2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]], dtype=torch.float64)
    expected = torch.tensor([[-1.2, -0.4, -0.4, -0.4, 0.0, 0.0, 0.8, 1.6]], dtype=torch.float64)
    torch.testing.assert_close(group_advantages(rewards_PG, std_floor=0.5), expected, rtol=0, atol=1e-15)


def test_default_floor_is_added_to_the_population_std():
    # Mean 0.5, std 0.5; with the sample std (0.5774) it would be 0.866.
    advantages = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0]], dtype=torch.float64))
    assert STD_FLOOR == 1e-4
    assert advantages[0].tolist() == pytest.approx(
        [0.5 / 0.5001, -0.5 / 0.5001, -0.5 / 0.5001, 0.5 / 0.5001], rel=1e-14
    )


def test_groups_do_not_see_each_other():
    rewards_PG = torch.tensor([[0.0, 1.0], [100.0, 300.0]], dtype=torch.float64)
    # Std 0.5 and 100, deviations 0.5 and 100.
    expected = torch.tensor([[-0.5, 0.5], [-100 / 100.5, 100 / 100.5]], dtype=torch.float64)
    expected[0] = torch.tensor([-0.5 / 1.0, 0.5 / 1.0])
    torch.testing.assert_close(group_advantages(rewards_PG, std_floor=0.5), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("value", [0.1, 0.3, 1 / 3, 1e6 + 0.1, -7.7])
@pytest.mark.parametrize("size", [1, 3, 7, 11])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exactly_zero(value, size, dtype):
    advantages = group_advantages(torch.full((2, size), value, dtype=dtype), std_floor=1e-12)
    assert torch.equal(advantages, torch.zeros(2, size, dtype=dtype))


def test_the_mean_of_equal_rewards_does_round():
    # Why equal rewards are a case of their own: the sum of seven times 0.1 is not 7 * 0.1.
    values = torch.full((1, 7), 0.1)
    assert not torch.equal(values - values.sum(1, keepdim=True) / 7, torch.zeros(1, 7))


def test_invalid_samples_take_no_part_even_if_nan():
    rewards_PG = torch.tensor([[1.0, math.nan, 3.0, math.inf], [5.0, 6.0, 7.0, 8.0], [1.0, 2.0, 3.0, 4.0]])
    valid_PG = torch.tensor([[True, False, True, False], [False] * 4, [False, False, True, False]])
    # Of row 0 remain 1 and 3: mean 2, std 1. Nothing remains of row 1, one sample of row 2.
    expected = torch.tensor([[-0.5, 0.0, 0.5, 0.0], [0.0] * 4, [0.0] * 4])
    assert torch.equal(group_advantages(rewards_PG, valid_PG, std_floor=1.0), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_and_shape_are_kept(dtype):
    advantages = group_advantages(torch.tensor([[0.0, 1.0, 2.0]] * 2, dtype=dtype))
    assert advantages.dtype == dtype
    assert advantages.shape == (2, 3)


@PROPERTY
@given(groups, st.randoms(use_true_random=False))
def test_equals_the_oracle(values, random):
    valid = [[random.random() < 0.7 for _ in row] for row in values]
    got = group_advantages(torch.tensor(values, dtype=torch.float64), torch.tensor(valid))
    for row, mask, line in zip(values, valid, got.tolist(), strict=True):
        assert line == pytest.approx(oracle(row, mask, 1e-4), rel=1e-9, abs=1e-9)


@PROPERTY
@given(groups, st.randoms(use_true_random=False))
def test_order_of_samples_does_not_matter(values, random):
    order = list(range(len(values[0])))
    random.shuffle(order)
    rewards_PG = torch.tensor(values, dtype=torch.float64)
    torch.testing.assert_close(group_advantages(rewards_PG[:, order]), group_advantages(rewards_PG)[:, order])


@PROPERTY
@given(groups, rewards, st.integers(1, 9))
def test_shift_and_scale_of_rewards_do_not_matter(values, shift, scale):
    rewards_PG = torch.tensor(values, dtype=torch.float64)
    plain = group_advantages(rewards_PG, std_floor=1e-300)
    torch.testing.assert_close(group_advantages(scale * rewards_PG + shift, std_floor=1e-300), plain)
    torch.testing.assert_close(plain.sum(1), torch.zeros(len(values), dtype=torch.float64), rtol=0, atol=1e-9)


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match=r"expected rewards of shape \[P, G\], but got \(3,\)"):
        group_advantages(torch.zeros(3))
    with pytest.raises(ValueError, match=r"expected a mask of shape \(2, 3\), but got \(2, 2\)"):
        group_advantages(torch.zeros(2, 3), torch.ones(2, 2, dtype=torch.bool))
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="expected finite rewards, but got NaN or infinity"):
            group_advantages(torch.tensor([[0.0, bad]]))
