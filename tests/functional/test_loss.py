import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_lightning.functional import clipped_surrogate

PROPERTY = settings(max_examples=100, deadline=None, derandomize=True, database=None)
token = st.tuples(
    st.floats(-8, 0),  # logprob
    st.floats(-1, 1),  # log-ratio
    st.integers(-3000, 3000).map(lambda i: i / 1000),  # advantage
    st.one_of(st.just(0.0), st.floats(0.001, 1)),  # weight
)
tokens = st.lists(token, min_size=1, max_size=20)
clips = st.tuples(st.floats(0, 0.9), st.floats(0, 2))


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def inputs(values):
    logprobs = f64([p for p, *_ in values]).requires_grad_()
    old = f64([p - d for p, d, *_ in values])
    return logprobs, old, f64([v[2] for v in values]), f64([v[3] for v in values])


def oracle(logprob, old, advantage, weight, low, high):
    """Loss, gradient and clip flags of one token, by cases."""
    ratio = math.exp(logprob - old)
    if advantage > 0 and ratio > 1 + high:
        return -weight * (1 + high) * advantage, 0.0, False, True
    if advantage < 0 and ratio < 1 - low:
        return -weight * (1 - low) * advantage, 0.0, True, False
    return -weight * ratio * advantage, -weight * ratio * advantage, False, False


def ratios(values, advantages, weights=None, **clip):
    logprobs = f64([math.log(r) for r in values]).requires_grad_()
    weights = [1.0] * len(values) if weights is None else weights
    result = clipped_surrogate(logprobs, torch.zeros_like(logprobs), f64(advantages), f64(weights), **clip)
    (gradient,) = torch.autograd.grad(result.loss, logprobs)
    return result, gradient.tolist()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "low", "high"),
    [
        (0.5, 1.0, -0.5, -0.5, False, False),  # too small though good: not clipped
        (1.0, 1.0, -1.0, -1.0, False, False),
        (1.1, 2.0, -2.2, -2.2, False, False),
        (1.5, 1.0, -1.2, 0.0, False, True),  # pushed up enough
        (1.5, 2.0, -2.4, 0.0, False, True),
        (0.5, -1.0, 0.8, 0.0, True, False),  # pushed down enough
        (0.9, -1.0, 0.9, 0.9, False, False),
        (1.0, -1.0, 1.0, 1.0, False, False),
        (1.5, -1.0, 1.5, 1.5, False, False),  # too large though bad: not clipped
        (0.5, 0.0, 0.0, 0.0, False, False),
        (1.5, 0.0, 0.0, 0.0, False, False),
    ],
)
def test_golden_numbers_with_default_clips(ratio, advantage, loss, gradient, low, high):
    result, got = ratios([ratio], [advantage])
    assert result.loss.item() == pytest.approx(loss, rel=1e-14, abs=1e-15)
    assert got == pytest.approx([gradient], rel=1e-14, abs=1e-15)
    assert result.clipped_low.tolist() == [low]
    assert result.clipped_high.tolist() == [high]
    assert result.log_ratio.tolist() == [math.log(ratio)]


def test_lower_and_upper_clip_are_separate():
    # Lower bound 0.9, upper bound 1.3.
    result, gradient = ratios([0.85, 0.95, 1.25, 1.4], [-1.0, -1.0, 1.0, 1.0], clip_low=0.1, clip_high=0.3)
    assert result.loss.item() == pytest.approx(0.9 + 0.95 - 1.25 - 1.3, rel=1e-14)
    assert gradient == pytest.approx([0.0, 0.95, -1.25, 0.0], rel=1e-14)
    assert result.clipped_low.tolist() == [True, False, False, False]
    assert result.clipped_high.tolist() == [False, False, False, True]


def test_weights_scale_tokens():
    result, gradient = ratios([1.0, 1.1, 1.0], [2.0, 1.0, -4.0], [0.5, 2.0, 0.25])
    assert result.loss.item() == pytest.approx(-1.0 - 2.2 + 1.0, rel=1e-14)
    assert gradient == pytest.approx([-1.0, -2.2, 1.0], rel=1e-14)


@PROPERTY
@given(tokens, clips)
def test_equals_the_oracle(values, clip):
    low, high = clip
    logprobs, old, advantages, weights = inputs(values)
    result = clipped_surrogate(logprobs, old, advantages, weights, clip_low=low, clip_high=high)
    result.loss.backward()
    expected = [
        oracle(*line, low, high)
        for line in zip(logprobs.tolist(), old.tolist(), advantages.tolist(), weights.tolist(), strict=True)
    ]
    # Exactly on an edge of the clip both gradients are right, and rounding decides the flags.
    edge = [min(abs(math.exp(d) - 1 + low), abs(math.exp(d) - 1 - high)) < 1e-12 for _, d, *_ in values]
    assert result.loss.item() == pytest.approx(math.fsum(e[0] for e in expected), rel=1e-9, abs=1e-12)
    for i, (_, gradient, is_low, is_high) in enumerate(expected):
        assert result.log_ratio[i].item() == logprobs[i].item() - old[i].item()
        if not edge[i]:
            assert logprobs.grad[i].item() == pytest.approx(gradient, rel=1e-9, abs=1e-12)
            assert (result.clipped_low[i].item(), result.clipped_high[i].item()) == (is_low, is_high)


@PROPERTY
@given(tokens, clips, st.randoms(use_true_random=False))
def test_order_of_tokens_does_not_matter(values, clip, random):
    shuffled = list(values)
    random.shuffle(shuffled)
    kwargs = {"clip_low": clip[0], "clip_high": clip[1]}
    one, other = (clipped_surrogate(*inputs(v), **kwargs).loss.item() for v in (values, shuffled))
    assert one == pytest.approx(other, rel=1e-9, abs=1e-12)


@PROPERTY
@given(tokens, st.lists(token, min_size=1, max_size=5))
def test_weight_zero_removes_a_token_exactly(values, extra):
    logprobs, *rest = inputs([*values, *((p, d, a, 0.0) for p, d, a, _ in extra)])
    result = clipped_surrogate(logprobs, *rest)
    result.loss.backward()
    assert torch.equal(logprobs.grad[len(values) :], torch.zeros(len(extra), dtype=torch.float64))
    alone, *rest = inputs(values)
    result_alone = clipped_surrogate(alone, *rest)
    result_alone.loss.backward()
    assert torch.equal(alone.grad, logprobs.grad[: len(values)])
    assert result.loss.item() == pytest.approx(result_alone.loss.item(), rel=1e-12, abs=1e-15)


@PROPERTY
@given(tokens)
def test_ratio_one_gives_the_reinforce_gradient(values):
    logprobs, _, advantages, weights = inputs(values)
    clipped_surrogate(logprobs, logprobs.detach().clone(), advantages, weights).loss.backward()
    assert torch.equal(logprobs.grad, -weights * advantages)


@pytest.mark.parametrize(("advantage", "weight"), [(1.0, 1.0), (1.0, 0.0), (-1.0, 0.0), (0.0, 0.0)])
def test_overflowing_ratios_without_a_say_leave_no_nan(advantage, weight):
    # exp(100) is infinite in float32. Clipped, or of weight 0, the token has gradient 0, not 0 * inf.
    logprobs = torch.tensor([-1.0, -1.0], requires_grad=True)
    old, advantages = torch.tensor([-101.0, -1.0]), torch.tensor([advantage, 2.0])
    result = clipped_surrogate(logprobs, old, advantages, torch.tensor([weight, 0.5]))
    result.loss.backward()
    assert result.loss.item() == pytest.approx(-1.2 * max(0.0, advantage) * weight - 1.0, rel=1e-6)
    assert logprobs.grad.tolist() == [0.0, -1.0]
    assert result.log_ratio.tolist() == [100.0, 0.0]


def test_gradcheck():
    # Log-ratios well within and well beyond the edges ln 0.8 = -0.223 and ln 1.2 = 0.182, for both signs of A.
    offsets = f64([-0.5, -0.1, 0.0, 0.1, 0.5, -0.5, -0.1, 0.0, 0.1, 0.5])
    old = f64([-0.3, -1.0, -2.0, -0.5, -4.0] * 2)
    advantages = f64([1.3] * 5 + [-0.7] * 5)
    weights = f64([0.1, 0.2, 0.3, 0.4, 0.5] * 2)
    logprobs = (old + offsets).requires_grad_()

    def loss(p):
        return clipped_surrogate(p, old, advantages, weights).loss

    assert torch.autograd.gradcheck(loss, logprobs)


def test_what_detectors_see_carries_no_gradient():
    logprobs = torch.zeros(3, requires_grad=True)
    result = clipped_surrogate(logprobs, torch.zeros(3), torch.ones(3), torch.ones(3))
    assert result.loss.requires_grad
    assert not result.log_ratio.requires_grad


def test_log_ratio_is_the_unclipped_one():
    result, _ = ratios([10.0, 0.01], [1.0, -1.0])
    assert result.log_ratio.tolist() == pytest.approx([math.log(10), math.log(0.01)], rel=1e-15)


def test_wrong_input_is_named():
    three = torch.zeros(3)
    with pytest.raises(
        ValueError, match=r"expected four tensors of one shape \[N\], but got shapes \[\(1,\), \(3,\)\]"
    ):
        clipped_surrogate(three, three, three, torch.zeros(1))
    with pytest.raises(ValueError, match="expected old logprobs without gradient, but they require grad"):
        clipped_surrogate(three, torch.zeros(3, requires_grad=True), three, three)
    for low, high in ((-0.1, 0.2), (1.0, 0.2), (0.2, -0.1), (math.nan, 0.2), (0.2, math.nan)):
        with pytest.raises(ValueError, match="expected 0 <= clip_low < 1 and clip_high >= 0, but got"):
            clipped_surrogate(three, three, three, three, clip_low=low, clip_high=high)
