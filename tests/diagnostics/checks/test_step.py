import math

import pytest
import torch
from torch.optim import SGD, Adam, AdamW

from grpo_lightning.diagnostics import Status
from grpo_lightning.diagnostics.checks.step import (
    StepSize,
    adam_bound,
    check_kept,
    check_moved,
    check_step_size,
    share_kept,
)


def stepped(make, *, dtype=torch.float32, steps=1, size=1.0):
    """What a step of an optimizer did to 1,000 numbers of the size of weights."""
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter((size * torch.randn(1000, generator=generator)).to(dtype))
    optimizer = make([parameter])
    for _ in range(steps):
        parameter.grad = torch.randn(1000, generator=generator).to(dtype)
        step = StepSize({"p": parameter}, optimizer)
        optimizer.step()
        step.take({"p": parameter})
    return step, {"p": parameter}


def test_numbers_of_a_plain_step():
    step, now = stepped(lambda p: SGD(p, lr=0.5))
    gradient = now["p"].grad.double()
    assert step.norm == pytest.approx(0.5 * float(gradient.norm()), rel=1e-5)
    assert step.loss_change == pytest.approx(-0.5 * float(gradient.square().sum()), rel=1e-5)
    assert step.cosine == pytest.approx(-1, abs=1e-5)
    assert step.relative == pytest.approx(1, rel=1e-5)
    assert (step.first, step.counted, step.elements) == (True, None, 1000)


def test_first_step_of_adam_has_a_learning_rate_in_each_element():
    step, _ = stepped(lambda p: AdamW(p, lr=1e-3))
    assert step.relative == pytest.approx(1, rel=1e-2)
    assert (step.first, step.counted) == (True, True)
    later, _ = stepped(lambda p: AdamW(p, lr=1e-3), steps=3)
    assert (later.first, later.counted) == (False, True)


@pytest.mark.parametrize("make", [lambda p: AdamW(p, lr=1e-5), lambda p: SGD(p, lr=1e-5, momentum=0.9)])
def test_small_updates_round_away_in_16_bits_alone(make):
    step, now = stepped(make, dtype=torch.bfloat16, steps=2)
    arrived, still = step.absorbed(now)
    assert arrived < 0.1
    assert still > 0.9
    full, now = stepped(make, steps=2)
    assert full.absorbed(now) is None


@pytest.mark.parametrize("make", [lambda p: AdamW(p, lr=0.1, weight_decay=0.1), lambda p: SGD(p, lr=0.1)])
def test_large_updates_arrive_in_16_bits(make):
    step, now = stepped(make, dtype=torch.bfloat16, steps=2)
    arrived, still = step.absorbed(now)
    assert arrived == pytest.approx(1, abs=0.02)
    assert still < 0.1


def rounding_step(parameters, dtype=torch.bfloat16, **settings):
    class Rounding(AdamW):
        def step(self, closure=None):
            super().step(closure)
            for parameter in parameters:
                parameter.data.copy_(parameter.data.to(dtype))

    return Rounding(parameters, **settings)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lr", [1e-6, 1e-2])
def test_steps_rounded_in_float32(dtype, lr):
    step, now = stepped(lambda p: rounding_step(p, dtype, lr=lr), steps=2)
    assert step.rounded(now)
    assert check_moved(**MOVED, rounded=True).cause == "updates_absorbed"


@pytest.mark.parametrize("lr", [1e-2, 1e-7, 1e-8, 1e-12])
def test_a_start_from_16_bits_is_no_rounding(lr):
    def from_half(parameters):
        parameters[0].data.copy_(parameters[0].data.bfloat16())
        return AdamW(parameters, lr=lr, weight_decay=0)

    step, now = stepped(from_half)
    assert not step.rounded(now)


MOVED = {"grad_norm": 1.0, "lr": 1e-4, "update_norm": 0.0, "updates": 3}


def test_moved():
    assert check_moved(**{**MOVED, "update_norm": 1.0}).status is Status.PASS
    assert check_moved(**{**MOVED, "lr": 0.0}).status is Status.NO_POWER
    assert check_moved(**{**MOVED, "grad_norm": 0.0}).status is Status.NO_POWER
    assert check_moved(**MOVED).cause == "parameters_stuck"
    assert check_moved(**MOVED, counted=True).cause == "parameters_stuck"
    assert check_moved(**MOVED, counted=False).cause == "skipped_steps"
    assert check_moved(**MOVED, absorbed=(0.0, 1.0)).cause == "updates_absorbed"
    assert check_moved(**{**MOVED, "update_norm": 1.0}, absorbed=(0.4, 0.6)).cause == "updates_absorbed"
    assert check_moved(**{**MOVED, "update_norm": 1.0}, absorbed=(0.9, 0.1)).status is Status.PASS


def test_share_of_a_step_that_is_kept():
    before, left = {"p": torch.zeros(4)}, {"p": torch.ones(4)}
    assert share_kept(before, left, left) == (1.0, 0.0)
    assert share_kept(before, left, before) == (0.0, 2.0)
    assert share_kept(before, before, left)[0] == 1.0
    assert check_kept(1.0, 1e-5, 2.0).status is Status.PASS
    assert check_kept(0.0, 2.0, 2.0).cause == "parameters_stuck"
    assert check_kept(1e-5, 2.001, 2.0).cause == "frozen_behind_noise"


@pytest.mark.parametrize(
    ("relative", "limit", "small", "cause"),
    [
        (1.0, 9.0, 0, ""),
        (8.9, 9.0, 0, ""),
        (9.1, 9.0, 0, "wrong_direction"),
        (60.0, math.inf, 0, ""),
        (1e-4, 9.0, 1, ""),
        (1e-4, 9.0, 2, "step_too_small"),
        (1e-4, math.inf, 2, "step_too_small"),
    ],
)
def test_step_size(relative, limit, small, cause):
    verdict = check_step_size(relative, min_relative=1e-3, max_relative=limit, small=small, needed=2)
    assert verdict.cause == cause


def largest_step(betas, gradients, *, idle=0):
    """Of Adam in one element, in learning rates, perhaps after many steps without a gradient."""
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = Adam([parameter], lr=1.0, betas=betas, eps=1e-300)
    parameter.grad = torch.zeros_like(parameter)
    if idle:
        optimizer.step()
        optimizer.state[parameter]["step"].fill_(idle)
    largest = 0.0
    for gradient in gradients:
        before = parameter.item()
        parameter.grad.fill_(gradient)
        optimizer.step()
        largest = max(largest, abs(parameter.item() - before))
    return largest


def growing(factor, steps=300):
    return [factor**i for i in range(steps)]


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.95), (0.0, 0.999), (0.5, 0.5)])
def test_bound_of_adam_is_reached_and_not_exceeded(betas):
    beta1, beta2 = betas
    bound = adam_bound(*betas)
    sparse = largest_step(betas, [1.0], idle=10**6)
    assert sparse == pytest.approx((1 - beta1) / (1 - beta2) ** 0.5)
    worst = largest_step(betas, growing(beta2 / beta1), idle=10**6) if beta1 else sparse
    assert worst == pytest.approx(bound, rel=1e-3)
    noise = torch.randn(300, generator=torch.Generator().manual_seed(0)).tolist()
    for gradients in (growing(1.02), growing(1.3), growing(0.9), noise):
        assert 1 <= largest_step(betas, gradients) * (1 + 1e-9) <= bound * (1 + 1e-8)


def test_bound_of_usual_betas():
    assert adam_bound(0.9, 0.999) == pytest.approx(7.27, abs=0.01)
    assert adam_bound(0.0, 0.999) == pytest.approx(31.6, abs=0.1)
    assert adam_bound(0.99, 0.9) == math.inf


def test_limit_of_a_step_is_that_of_the_optimizer():
    step, _ = stepped(lambda p: AdamW(p, lr=1e-3))
    assert step.max_relative == pytest.approx(2 + adam_bound(0.9, 0.999))
    step, _ = stepped(lambda p: AdamW(p, lr=1e-3, betas=(0.0, 0.999)))
    assert step.max_relative > 31.6
    assert stepped(lambda p: SGD(p, lr=1.0))[0].max_relative == math.inf
