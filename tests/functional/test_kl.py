import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_lightning.functional import kl_k3

PROPERTY = settings(max_examples=100, deadline=None, derandomize=True, database=None)
logprobs = st.lists(st.tuples(st.floats(-20, 0), st.floats(-20, 0)), min_size=1, max_size=20)


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def test_golden_numbers():
    # Ratio ref / policy = 1/2, 1, 2, 4: k3 = ratio - ln(ratio) - 1.
    policy = f64([math.log(0.5), math.log(0.25), math.log(0.25), math.log(0.125)])
    reference = f64([math.log(0.25), math.log(0.25), math.log(0.5), math.log(0.5)])
    expected = [0.1931471805599453, 0.0, 0.3068528194400547, 1.6137056388801094]
    assert kl_k3(policy, reference).tolist() == pytest.approx(expected, rel=1e-14, abs=1e-15)


def test_gradient_is_one_minus_the_ratio():
    policy = f64([math.log(0.5), math.log(0.25), math.log(0.25), math.log(0.125)]).requires_grad_()
    reference = f64([math.log(0.25), math.log(0.25), math.log(0.5), math.log(0.5)])
    (gradient,) = torch.autograd.grad(kl_k3(policy, reference).sum(), policy)
    assert gradient.tolist() == pytest.approx([0.5, 0.0, -1.0, -3.0], rel=1e-14, abs=1e-15)


def test_gradcheck():
    policy = f64([-0.1, -1.0, -2.5, -7.0, -0.3]).requires_grad_()
    reference = f64([-0.1, -2.0, -1.5, -6.0, -0.2])
    assert torch.autograd.gradcheck(lambda p: kl_k3(p, reference), policy)


@PROPERTY
@given(logprobs)
def test_equals_the_oracle_and_is_not_negative(pairs):
    policy, reference = (list(column) for column in zip(*pairs, strict=True))
    got = kl_k3(f64(policy), f64(reference)).tolist()
    expected = [math.expm1(r - p) - (r - p) for p, r in pairs]
    assert got == pytest.approx(expected, rel=1e-9, abs=1e-15)
    # One unit in the last place of the larger term is the rounding of the subtraction.
    assert all(k >= -2.3e-16 * abs(r - p) for k, (p, r) in zip(got, pairs, strict=True))


@PROPERTY
@given(logprobs)
def test_is_zero_at_equality_in_value_and_gradient(pairs):
    for dtype in (torch.float32, torch.float64):
        policy = torch.tensor([p for p, _ in pairs], dtype=dtype, requires_grad=True)
        k3 = kl_k3(policy, policy.detach().clone())
        k3.sum().backward()
        assert torch.equal(k3, torch.zeros_like(k3))
        assert torch.equal(policy.grad, torch.zeros_like(policy))


def test_small_differences_survive_float32():
    # delta = 2^-13: delta^2 / 2 = 7.45e-9 is below float32's resolution around 1 (6e-8): exp(delta) - 1 - delta
    # loses it.
    delta = torch.tensor([2.0**-13])
    naive = delta.exp() - 1 - delta
    assert kl_k3(-delta, torch.zeros(1)).item() == pytest.approx(2.0**-27, rel=1e-2)
    assert naive.item() != pytest.approx(2.0**-27, rel=0.5)


@PROPERTY
@given(st.lists(st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)), min_size=2, max_size=12))
def test_is_unbiased(weights):
    # Its expectation over the policy's own distribution is the KL divergence.
    p_sum, q_sum = math.fsum(p for p, _ in weights), math.fsum(q for _, q in weights)
    p = [w / p_sum for w, _ in weights]
    q = [w / q_sum for _, w in weights]
    k3 = kl_k3(f64([math.log(x) for x in p]), f64([math.log(x) for x in q])).tolist()
    expectation = math.fsum(x * k for x, k in zip(p, k3, strict=True))
    assert expectation == pytest.approx(math.fsum(x * math.log(x / y) for x, y in zip(p, q, strict=True)), abs=1e-12)


def test_no_gradient_reaches_a_detached_reference():
    policy = torch.zeros(3, requires_grad=True)
    reference = torch.ones(3)
    kl_k3(policy, reference).sum().backward()
    assert reference.grad is None


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match=r"expected equal shapes, but got \(3,\) and \(1,\)"):
        kl_k3(torch.zeros(3), torch.zeros(1))
