import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_lightning.functional.kl import (
    IN_LOSS,
    IN_REWARD,
    KL_ESTIMATORS,
    adaptive_coefficient,
    kl_abs,
    kl_k1,
    kl_k2,
    kl_k3,
)

PROPERTY = settings(max_examples=100, deadline=None, derandomize=True, database=None)
logprobs = st.lists(st.tuples(st.floats(-20, 0), st.floats(-20, 0)), min_size=1, max_size=20)


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


# Ratio policy / reference = 2, 1, 1/2, 1/4, so log-ratios ln 2, 0, -ln 2, -2 ln 2.
POLICY = [math.log(0.5), math.log(0.25), math.log(0.25), math.log(0.125)]
REFERENCE = [math.log(0.25), math.log(0.25), math.log(0.5), math.log(0.5)]
LN2 = 0.6931471805599453


@pytest.mark.parametrize(
    ("estimator", "values", "gradients"),
    [
        # The log-ratio, of gradient 1.
        (kl_k1, [LN2, 0, -LN2, -2 * LN2], [1, 1, 1, 1]),
        # Half its square, of gradient the log-ratio: (ln 2)^2 / 2 = 0.24022650695910072.
        (kl_k2, [0.24022650695910072, 0, 0.24022650695910072, 4 * 0.24022650695910072], [LN2, 0, -LN2, -2 * LN2]),
        # Its absolute value, of gradient its sign.
        (kl_abs, [LN2, 0, LN2, 2 * LN2], [1, 0, -1, -1]),
    ],
)
def test_golden_numbers_and_gradients(estimator, values, gradients):
    policy = f64(POLICY).requires_grad_()
    estimates = estimator(policy, f64(REFERENCE))
    assert estimates.tolist() == pytest.approx(values, rel=1e-14, abs=1e-15)
    (gradient,) = torch.autograd.grad(estimates.sum(), policy)
    assert gradient.tolist() == pytest.approx(gradients, rel=1e-14, abs=1e-15)


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


@pytest.mark.parametrize("name", KL_ESTIMATORS)
def test_gradcheck(name):
    policy = f64([-0.1, -1.0, -2.5, -7.0, -0.3]).requires_grad_()
    # Nowhere equal: there the absolute value has its kink.
    reference = f64([-0.15, -2.0, -1.5, -6.0, -0.2])
    assert torch.autograd.gradcheck(lambda p: KL_ESTIMATORS[name](p, reference), policy)


ORACLE = {
    "k1": lambda p, r: p - r,
    "k2": lambda p, r: (p - r) ** 2 / 2,
    "k3": lambda p, r: math.expm1(r - p) - (r - p),
    "abs": lambda p, r: abs(p - r),
}


@PROPERTY
@given(logprobs)
def test_every_estimator_equals_its_oracle_in_any_order(pairs):
    policy, reference = (f64(column) for column in zip(*pairs, strict=True))
    for name, estimator in KL_ESTIMATORS.items():
        estimates = estimator(policy, reference)
        assert estimates.tolist() == pytest.approx([ORACLE[name](p, r) for p, r in pairs], rel=1e-9, abs=1e-15)
        assert torch.equal(estimator(policy.flip(0), reference.flip(0)), estimates.flip(0))


@pytest.mark.parametrize("name", KL_ESTIMATORS)
@pytest.mark.parametrize("log_ratio", [-50.0, 50.0])
def test_extreme_log_ratios_stay_finite(name, log_ratio):
    policy = f64([log_ratio - 60]).requires_grad_()
    estimate = KL_ESTIMATORS[name](policy, f64([-60.0]))
    (gradient,) = torch.autograd.grad(estimate.sum(), policy)
    assert estimate.tolist() == pytest.approx([ORACLE[name](log_ratio, 0.0)], rel=1e-13)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", KL_ESTIMATORS)
def test_no_tokens(name):
    assert KL_ESTIMATORS[name](torch.zeros(0), torch.zeros(0)).shape == (0,)


def test_estimators_by_name():
    assert {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3, "abs": kl_abs} == KL_ESTIMATORS
    assert IN_LOSS == ("k2", "k3", "abs")
    assert tuple(KL_ESTIMATORS) == IN_REWARD


def distributions(seed, size=6):
    """Logits of a policy, with gradient, and the log-probabilities of a reference."""
    generator = torch.Generator().manual_seed(seed)
    logits, reference = (torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(2))
    return logits.requires_grad_(), torch.log_softmax(reference, -1)


def gradient(value, *inputs):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, inputs, retain_graph=True)])


def reverse(p, q):
    return (p.exp() * (p - q)).sum()


def forward(p, q):
    return (q.exp() * (q - p)).sum()


def distance(p, q):
    return (p.exp() - q.exp()).abs().sum()


def mean(estimator):
    return lambda p, q: (p.exp() * estimator(p, q)).sum()


IN_LOSS_OBJECTIVES = {
    "k1": lambda p, q: 0 * p.sum(),
    "k2": reverse,
    "k3": forward,
    "abs": distance,
}
IN_REWARD_OBJECTIVES = {
    "k1": reverse,
    "k2": lambda p, q: mean(kl_k2)(p, q) - reverse(p, q),
    "k3": lambda p, q: reverse(p, q) - forward(p, q),
    "abs": lambda p, q: mean(kl_abs)(p, q) - distance(p, q),
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", KL_ESTIMATORS)
def test_expected_gradient_in_the_loss(name, seed):
    logits, q = distributions(seed)
    p = torch.log_softmax(logits, -1)
    # Tokens are sampled: their probability is how often each comes, not a path of the gradient.
    computed = gradient((p.detach().exp() * KL_ESTIMATORS[name](p, q)).sum(), logits)
    expected = gradient(IN_LOSS_OBJECTIVES[name](torch.log_softmax(logits, -1), q), logits)
    torch.testing.assert_close(computed, expected, rtol=1e-12, atol=1e-14)
    assert (computed.norm() > 0.01) == (name in IN_LOSS)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", KL_ESTIMATORS)
def test_expected_gradient_in_the_reward(name, seed):
    logits, q = distributions(seed)
    p = torch.log_softmax(logits, -1)
    penalty = KL_ESTIMATORS[name](p, q).detach()
    computed = gradient((p.detach().exp() * penalty * p).sum(), logits)
    expected = gradient(IN_REWARD_OBJECTIVES[name](torch.log_softmax(logits, -1), q), logits)
    torch.testing.assert_close(computed, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("name", "in_loss", "order"),
    [("k1", False, 1), ("k2", True, 1), ("k3", True, 1), ("k2", False, 2), ("k3", False, 2), ("abs", False, 1)],
)
def test_order_of_the_pull_near_the_reference(name, in_loss, order):
    # A hundredth of the distance: a hundredth of the gradient if it is of first order, a ten thousandth if of second.
    logits, q = distributions(0)
    direction, norms = logits.detach(), []
    for step in (1e-2, 1e-4):
        near = (q + step * direction).requires_grad_()
        objective = (IN_LOSS_OBJECTIVES if in_loss else IN_REWARD_OBJECTIVES)[name]
        norms.append(gradient(objective(torch.log_softmax(near, -1), q), near).norm().item())
    assert norms[1] / norms[0] == pytest.approx(100.0**-order, rel=0.05)


def test_over_a_sequence_only_the_reward_counts_which_prefixes_are_reached():
    # Two tokens of a vocabulary of three: one distribution for the first, one for the second after each first.
    generator = torch.Generator().manual_seed(3)
    first, second, q1, q2 = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3,), (3, 3), (3,), (3, 3))
    )
    parameters = first.requires_grad_(), second.requires_grad_()
    p1, p2 = (torch.log_softmax(p, -1) for p in parameters)
    q1, q2 = (torch.log_softmax(q, -1) for q in (q1, q2))
    joint, reference = p1[:, None] + p2, q1[:, None] + q2
    sampled = joint.detach().exp()
    exact = gradient((joint.exp() * (joint - reference)).sum(), *parameters)
    # All that is subtracted counts in the return of both tokens.
    in_reward = gradient((sampled * (joint - reference).detach() * joint).sum(), *parameters)
    torch.testing.assert_close(in_reward, exact, rtol=1e-12, atol=1e-14)
    in_loss = gradient((sampled * (kl_k2(p1, q1)[:, None] + kl_k2(p2, q2))).sum(), *parameters)
    per_token = (p1.exp() * (p1 - q1)).sum() + (p1.detach().exp() * (p2.exp() * (p2 - q2)).sum(-1)).sum()
    torch.testing.assert_close(in_loss, gradient(per_token, *parameters), rtol=1e-12, atol=1e-14)
    assert not torch.allclose(in_loss, exact, rtol=1e-2)


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


@pytest.mark.parametrize("name", KL_ESTIMATORS)
def test_wrong_input_is_named(name):
    with pytest.raises(ValueError, match=r"expected equal shapes, but got \(3,\) and \(1,\)"):
        KL_ESTIMATORS[name](torch.zeros(3), torch.zeros(1))


@pytest.mark.parametrize(
    ("observed", "expected"),
    [
        # 10 % above the target of 6: the error is 0.1, a tenth of which is added.
        (6.6, 0.2 * 1.01),
        (6.0, 0.2),
        (5.4, 0.2 * 0.99),
        # Errors beyond 20 % count as 20 %.
        (7.2, 0.2 * 1.02),
        (600.0, 0.2 * 1.02),
        (4.8, 0.2 * 0.98),
        (0.0, 0.2 * 0.98),
        (-3.0, 0.2 * 0.98),
    ],
)
def test_golden_adaptive_coefficient(observed, expected):
    assert adaptive_coefficient(0.2, observed, target=6.0, horizon=10) == pytest.approx(expected, rel=1e-14)


@PROPERTY
@given(st.floats(0, 10), st.floats(-1e6, 1e6), st.floats(1e-6, 1e3), st.floats(1, 1e5))
def test_adaptive_coefficient_moves_to_the_target_within_its_bounds(coefficient, observed, target, horizon):
    after = adaptive_coefficient(coefficient, observed, target=target, horizon=horizon)
    assert coefficient * (1 - 0.2 / horizon) * (1 - 1e-15) <= after <= coefficient * (1 + 0.2 / horizon) * (1 + 1e-15)
    assert (after - coefficient) * (observed - target) >= 0


def test_adaptive_coefficient_settles_where_the_target_is_met():
    # A run whose divergence is 1 / coefficient, held to 4: the coefficient must come to 1/4.
    coefficient = 5.0
    for _ in range(2000):
        coefficient = adaptive_coefficient(coefficient, 1 / coefficient, target=4.0, horizon=10)
    assert coefficient == pytest.approx(0.25, rel=1e-9)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_adaptive_coefficient_refuses_a_broken_observation(bad):
    with pytest.raises(ValueError, match=f"expected a finite observed_kl, but got {bad}"):
        adaptive_coefficient(0.1, bad, target=1.0, horizon=10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coefficient": -0.1}, "expected a finite coefficient >= 0, but got -0.1"),
        ({"coefficient": math.nan}, "expected a finite coefficient >= 0, but got nan"),
        ({"target": 0.0}, "expected a finite target > 0, but got 0.0"),
        ({"target": math.inf}, "expected a finite target > 0, but got inf"),
        ({"horizon": 0.5}, "expected a finite horizon >= 1, but got 0.5"),
        ({"horizon": math.nan}, "expected a finite horizon >= 1, but got nan"),
    ],
)
def test_adaptive_coefficient_refuses_wrong_settings(change, message):
    right = {"coefficient": 0.1, "observed_kl": 1.0, "target": 1.0, "horizon": 10}
    with pytest.raises(ValueError, match=message):
        adaptive_coefficient(**(right | change))
