import pytest
import torch

from grpo_lightning.diagnostics import Status
from grpo_lightning.diagnostics.checks.ascent import (
    Movement,
    Noise,
    check_ascent,
    check_descends,
    check_train_noise,
    movement,
)

QUIET = Noise(0.0, 1e-5)
DROPOUT = Noise(0.1, 1e-5)
PERTURBED = Noise(0.0, 1e-5, parameters=True)


def check(ratio, *, small=None, noise=QUIET, moved=1e3, still=False, error=1e-3):
    part = None if small is None else Movement(-0.01, -0.01 * small, error / 100)
    return check_ascent(Movement(-1.0, -ratio, error), part, noise, moved=moved, still=still)


def draw(seed, *, noise, step, n=400, depends=1.0):
    """Logprobs linear in 30 parameters, moved down the gradient, seen through noise."""
    generator = torch.Generator().manual_seed(seed)
    slope = torch.randn(n, 30, generator=generator, dtype=torch.float64)
    gradient = torch.randn(n, generator=generator, dtype=torch.float64) / n
    moved = -step * (slope.T @ gradient).sign()
    change = depends * slope @ moved
    change += 2**0.5 * noise * torch.randn(n, generator=generator, dtype=torch.float64)
    return movement(gradient, change, float(gradient @ slope @ moved), noise), change


@pytest.mark.parametrize("step", [1e-6, 1e-5, 1e-4, 1e-3])
def test_healthy_steps_raise_no_alarm_and_large_ones_pass(step):
    status = []
    for seed in range(500):
        whole, change = draw(seed, noise=1e-5, step=step)
        moved = float(change.square().mean().sqrt()) / (2**0.5 * 1e-5)
        status.append(check_ascent(whole, None, QUIET, moved=moved, still=False).status)
    assert Status.FAIL not in status
    assert step < 1e-3 or set(status) == {Status.PASS}


@pytest.mark.parametrize(("depends", "cause"), [(0.0, "policy_frozen"), (-1.0, "wrong_direction")])
def test_power(depends, cause):
    for seed in range(500):
        whole, change = draw(seed, noise=1e-5, step=1e-3, depends=depends)
        moved = float(change.square().mean().sqrt()) / (2**0.5 * 1e-5)
        small = Movement(0.1 * whole.predicted, 0.1 * whole.observed, whole.error)
        assert check_ascent(whole, small, QUIET, moved=moved, still=False).cause == cause


def test_standard_error_is_that_of_repetitions():
    errors = []
    for seed in range(2000):
        whole, _ = draw(seed, noise=1e-5, step=0.0)
        errors.append(whole.observed / whole.error)
    assert float(torch.tensor(errors).std()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("ratio", [0.6, 1.0, 1.9])
def test_agreement(ratio):
    assert check(ratio).status is Status.PASS
    assert check(-3.0, small=ratio).status is Status.PASS  # a step too large to be linear


def test_no_power():
    verdict = check(0.0, error=0.2)
    assert verdict.status is Status.NO_POWER
    assert "below 10 times the noise" in verdict.message
    assert check(4.0).status is Status.NO_POWER  # nothing smaller to compare
    assert check(0.0, error=20.0, still=True).status is Status.NO_POWER  # a step nobody could see


@pytest.mark.parametrize(
    ("noise", "cause"),
    [(QUIET, "policy_frozen"), (DROPOUT, "frozen_behind_dropout"), (PERTURBED, "frozen_behind_noise")],
)
@pytest.mark.parametrize("still", [True, False])
def test_frozen(noise, cause, still):
    verdict = check(0.01, noise=noise, moved=1.0, still=still)
    assert verdict.cause == cause
    assert verdict.fix
    assert verdict.ruled_out


@pytest.mark.parametrize(
    ("small", "cause", "words"),
    [(-1.0, "wrong_direction", "against its loss"), (0.3, "wrong_gradient", "changes it by 0.3 times")],
)
def test_wrong_gradient_of_the_parameters(small, cause, words):
    verdict = check(small, small=small)
    assert verdict.cause == cause
    assert words in verdict.message


def test_dropout_excuses_what_one_draw_of_it_explains():
    assert check(0.3, small=0.3, noise=DROPOUT).status is Status.NO_POWER
    assert check(-1.0, small=-1.0, noise=DROPOUT).cause == "wrong_direction"


def test_descent():
    assert check_descends(-0.5, first=True, streak=0, allowed=25).status is Status.PASS
    assert check_descends(0.5, first=False, streak=24, allowed=25).status is Status.PASS
    assert check_descends(0.5, first=False, streak=25, allowed=25).cause == "wrong_direction"
    assert check_descends(0.5, first=True, streak=1, allowed=25).cause == "wrong_direction"


def test_train_mode_noise():
    agrees, half = Movement(-1.0, -0.9, 1e-3), Movement(-1.0, -0.55, 1e-3)
    assert check_train_noise(QUIET, agrees, declared=False).status is Status.PASS
    assert check_train_noise(DROPOUT, agrees, declared=True).status is Status.PASS
    assert check_train_noise(DROPOUT, agrees, declared=False).cause == "noisy_forward"
    assert check_train_noise(DROPOUT, half, declared=True).cause == "noisy_forward"
    assert check_train_noise(DROPOUT, Movement(-1.0, -0.55, 1.0), declared=True).status is Status.PASS
