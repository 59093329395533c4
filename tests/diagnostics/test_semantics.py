"""What the sampler's logprobs are instead is named, in few tokens, and a healthy engine is left alone."""

import math

import pytest
import torch
from toy_sampling import at_temperature, draw, picked, top_k, top_p

from grpo_lightning.diagnostics import Status
from grpo_lightning.diagnostics.attribution import SHARES, attribute
from grpo_lightning.diagnostics.checks.semantics import check_semantics, check_trainer_temperature, check_values
from grpo_lightning.diagnostics.hypotheses import normal_z, of_distributions, of_order
from grpo_lightning.diagnostics.thresholds import Thresholds

THRESHOLDS = Thresholds()
FLOAT32, BFLOAT16 = 1e-5, 5e-2
NOISES = pytest.mark.parametrize("noise", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])


def noisy(s, noise, seed):
    """Noise that grows as the token gets less likely."""
    generator = torch.Generator().manual_seed(seed)
    return s + noise * torch.randn(len(s), generator=generator, dtype=torch.float64) * (0.5 + 0.25 * s.abs())


def bank(toy, temperature):
    o, hypotheses = of_distributions(toy.logp.split(50), toy.tokens, temperature)
    return o, hypotheses + of_order(o, toy.sequence)


def judged(toy, s, noise, temperature=1.0):
    o, hypotheses = bank(toy, temperature)
    return check_semantics(s, o, toy.sequence, hypotheses, THRESHOLDS, noise)


@NOISES
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_a_healthy_engine_passes(noise, temperature):
    for seed in range(15):
        toy = draw(seed, 256, temperature=temperature)
        answer = judged(toy, noisy(toy.s, noise, seed), noise, temperature)
        assert answer.status is Status.PASS, f"seed {seed}: {answer}"


@NOISES
def test_raw_logprobs(noise):
    for seed in range(4):
        toy = draw(seed, 64, temperature=0.7)
        raw = picked((toy.logp * 0.7).log_softmax(-1), toy.tokens)
        assert judged(toy, noisy(raw, noise, seed), noise, 0.7).cause == "raw_logprobs"


@NOISES
@pytest.mark.parametrize(("declared", "real"), [(1.0, 0.85), (0.7, 1.0), (0.8, 0.75)])
def test_another_temperature(noise, declared, real):
    for seed in range(4):
        toy = draw(seed, 256, at_temperature(real), temperature=declared)
        answer = judged(toy, noisy(toy.s, noise, seed), noise, declared)
        assert answer.cause == "wrong_temperature"
        assert answer.evidence["temperature that fits"] == pytest.approx(real, rel=0.06)


@pytest.mark.parametrize(
    ("distribution", "name", "noise"),
    [
        (top_p(0.95), "top_p = 0.95", FLOAT32),
        (top_p(0.95), "top_p = 0.95", BFLOAT16),
        (top_p(0.99), "top_p = 0.99", FLOAT32),
        (top_k(20), "top_k = 20", BFLOAT16),
    ],
)
def test_truncation(distribution, name, noise):
    for seed in range(4):
        toy = draw(seed, 256, distribution)
        answer = judged(toy, noisy(toy.s, noise, seed), noise)
        assert answer.cause == "truncated_sampling"
        assert name in answer.message


@NOISES
@pytest.mark.parametrize("lag", [-2, -1, 1, 2])
def test_shifts(noise, lag):
    toy = draw(lag + 10, 64)
    s = torch.cat([part.roll(lag) for part in toy.s.split(16)])
    answer = judged(toy, noisy(s, noise, 0), noise)
    assert answer.cause == "shifted_logprobs"
    assert f"shifted by {abs(lag)} {'forwards' if lag > 0 else 'backwards'}" in answer.message


def test_a_policy_that_is_certain_cannot_be_judged():
    toy = draw(0, 64, sharpness=1000.0)
    answer = judged(toy, toy.s, FLOAT32)
    assert answer.status is Status.NO_POWER
    assert "needs 32" in answer.message


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda s: torch.zeros_like(s), "logprobs_zero"),
        (lambda s: torch.full_like(s, -2.0), "logprobs_constant"),
        (lambda s: torch.where(torch.arange(len(s)) == 3, math.nan, s), "logprobs_missing"),
    ],
)
def test_values_that_are_none(change, cause):
    toy = draw(0, 128)
    assert check_values(toy.s, toy.o, THRESHOLDS).status is Status.PASS
    assert check_values(change(toy.s), toy.o, THRESHOLDS).cause == cause


def test_a_trainer_at_another_temperature():
    toy = draw(0, 256, temperature=0.7)
    o, hypotheses = bank(toy, 0.7)
    raw = next(h for h in hypotheses if h.inverse_temperatures is not None and h.inverse_temperatures[1] == 1.0)

    def answer(used):
        return check_trainer_temperature(used, o, toy.sequence, hypotheses, THRESHOLDS, FLOAT32)

    found = answer(raw.logprobs)
    assert found.cause == "wrong_temperature"
    assert "at a temperature of about 1, but samples are drawn at 0.7" in found.message
    assert answer(o).status is Status.PASS
    assert answer(noisy(o, BFLOAT16, 1)).status is Status.PASS


def shares(s, toy, noise, temperature=1.0):
    o, hypotheses = bank(toy, temperature)
    found = attribute(s, o, toy.sequence, hypotheses, noise, THRESHOLDS.z)
    assert set(found) == set(SHARES)
    assert sum(found.values()) == pytest.approx(1)
    assert min(found.values()) >= 0
    return found


class TestAttribution:
    def test_noise(self):
        toy = draw(0, 256)
        assert shares(noisy(toy.s, BFLOAT16, 1), toy, 2 * BFLOAT16)["noise"] > 0.9

    def test_a_few_times_the_noise_floor_is_noise(self):
        toy = draw(0, 256)
        assert shares(noisy(toy.s, FLOAT32, 1), toy, FLOAT32 / 2)["noise"] > 0.9
        assert shares(noisy(toy.s, FLOAT32, 1), toy, FLOAT32 / 30)["unexplained"] > 0.9

    def test_temperature(self):
        toy = draw(0, 256, temperature=0.7)
        raw = picked((toy.logp * 0.7).log_softmax(-1), toy.tokens)
        assert shares(noisy(raw, BFLOAT16, 1), toy, BFLOAT16, 0.7)["temperature"] > 0.9

    def test_truncation_and_noise(self):
        toy = draw(0, 512, top_p(0.9))
        found = shares(noisy(toy.s, 0.02, 1), toy, 0.02)
        assert found["truncation"] > 0.6
        assert found["truncation"] + found["noise"] > 0.9

    def test_missing(self):
        toy = draw(0, 256)
        s = noisy(toy.s, FLOAT32, 1)
        s[::10] = 0.0
        assert shares(s, toy, FLOAT32)["missing"] > 0.9

    def test_retokenisation_is_local(self):
        toy = draw(0, 256)
        s = noisy(toy.s, FLOAT32, 1)
        s[[20, 90, 91, 200]] -= torch.tensor([3.0, -1.0, 2.0, 4.0], dtype=torch.float64)
        assert shares(s, toy, FLOAT32)["retokenisation"] > 0.9

    def test_what_nothing_explains(self):
        toy = draw(0, 256)
        s = toy.s + 0.4 * (-1.0) ** torch.arange(256)
        assert shares(s, toy, FLOAT32)["unexplained"] > 0.9

    def test_no_difference(self):
        toy = draw(0, 64)
        o, hypotheses = bank(toy, 1.0)
        assert attribute(o, o, toy.sequence, hypotheses, None, THRESHOLDS.z) is None


@pytest.mark.parametrize(("degrees", "t"), [(3, 267.0), (5, 43.90), (11, 12.01), (29, 6.970), (1000, 5.339)])
def test_students_t_as_a_normal_variable(degrees, t):
    assert normal_z(t, degrees) == pytest.approx(5.3, rel=0.025)
    assert normal_z(1e9, 1) == 0
