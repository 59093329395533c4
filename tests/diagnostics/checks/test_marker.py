import pytest
import torch

from grpo_lightning.diagnostics.checks.marker import (
    Hypothesis,
    Marker,
    allowed_mismatch,
    check_markers,
    check_precision,
    fit,
)
from grpo_lightning.diagnostics.thresholds import Thresholds
from grpo_lightning.diagnostics.verdict import Status

N = 96
FAMILIES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FLOAT32, BFLOAT16 = 1e-5, 5e-2
LIMITS = Thresholds()


class Made:
    """What a trainer would say with the markers, and engines that serve them in some way."""

    def __init__(self, seed=0, noise=FLOAT32, effect=0.6, start=0.0):
        self.generator = torch.Generator().manual_seed(seed)
        self.noise = noise
        self.base = -self.normal().abs() * 2
        self.start = self.base + start * self.normal()
        self.trained = [self.base + effect * self.normal() for _ in FAMILIES]

    def normal(self):
        return torch.randn(N, generator=self.generator, dtype=torch.float64)

    def noisy(self, values):
        return values + self.noise * self.normal()

    def verdict(self, served=None, **settings):
        served = self.trained if served is None else served
        markers = [Marker(f, c, self.noisy(s)) for f, c, s in zip(FAMILIES, self.trained, served, strict=True)]
        start = Marker("start", self.start, self.noisy(self.start))
        return check_markers(self.base, start, markers, self.noise, LIMITS, **settings)

    def part(self, factor):
        return [self.base + factor * (c - self.base) for c in self.trained]


@pytest.fixture(params=[FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
def noise(request):
    return request.param


@pytest.fixture(params=[0.0, 0.5], ids=["fresh", "trained"])
def start(request):
    return request.param


def test_the_fit_of_known_data():
    base = torch.zeros(4, dtype=torch.float64)
    trained = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    found = fit(Marker("q_proj", trained, 0.5 * trained), base, noise=0.1)
    assert (found.slope, found.effect) == (0.5, 1.0)
    assert found.se == pytest.approx(0.1 / 2)


def test_healthy_engines_are_left_alone(noise, start):
    for seed in range(300):
        verdict = Made(seed, noise, start=start).verdict()
        assert verdict.status is Status.PASS, (seed, verdict)


@pytest.mark.parametrize("seed", range(20))
class TestCauses:
    def test_noop(self, noise, seed):
        made = Made(seed, noise, start=0.5)
        assert made.verdict([made.start] * 7).cause == "sync_noop"

    @pytest.mark.parametrize(
        ("applies", "cause"), [(True, "sync_noop"), (None, "sync_noop"), (False, "adapter_ignored")]
    )
    def test_a_fresh_start_looks_like_the_base(self, noise, seed, applies, cause):
        made = Made(seed, noise)
        assert made.verdict([made.base] * 7, applies=lambda: applies).cause == cause

    def test_ignored(self, noise, seed):
        made = Made(seed, noise, start=0.5)
        assert made.verdict([made.base] * 7).cause == "adapter_ignored"

    @pytest.mark.parametrize("late", [1, 2])
    def test_late(self, noise, seed, start, late):
        made = Made(seed, noise, start=start)
        verdict = made.verdict([made.start] * late + made.trained[:-late])
        assert verdict.cause == "sync_stale"
        assert f"{late} publication(s) before" in verdict.message

    def test_partial(self, noise, seed, start):
        made = Made(seed, noise, start=start)
        served = [*made.trained[:2], made.base, *made.trained[3:5], made.base, made.trained[6]]
        verdict = made.verdict(served)
        assert verdict.cause == "adapter_partial"
        assert "v_proj, up_proj." in verdict.message

    def test_part_of_a_family(self, noise, seed):
        made = Made(seed, noise)
        half = made.base + torch.where(torch.arange(N) % 2 == 0, 1.0, 0.2) * (made.trained[0] - made.base)
        verdict = made.verdict([half, *made.trained[1:]])
        assert (verdict.cause, "part of the adapter in q_proj" in verdict.message) == ("adapter_partial", True)

    def test_what_a_hypothesis_explains(self, noise, seed):
        made = Made(seed, noise)

        def hypotheses(marker):
            true = made.base + 0.5 * (marker.trained - made.base)
            return [
                Hypothesis("merged_rounding", "something else", made.base),
                Hypothesis("adapter_scale", "the adapter at 0.5 times its size", true),
            ]

        verdict = made.verdict(made.part(0.5), hypotheses=hypotheses)
        assert verdict.cause == "adapter_scale"
        assert "at 0.5 times its size" in verdict.message
        assert made.verdict(made.part(1.5)).cause == "adapter_changed"


def test_a_small_difference_shows_in_float32_alone():
    for noise, status in ((FLOAT32, Status.FAIL), (BFLOAT16, Status.PASS)):
        made = Made(noise=noise)
        served = [c + 0.01 * made.normal() for c in made.trained]
        assert made.verdict(served).status is status
    assert allowed_mismatch(FLOAT32) == 1e-3


def test_markers_within_the_noise_decide_nothing():
    verdict = Made(noise=BFLOAT16, effect=0.2).verdict()
    assert verdict.status is Status.NO_POWER
    assert "more canary tokens or an engine in float32" in verdict.message


class TestPrecision:
    def verdict(self, seed, noise, share, *, effect=1e-3, own=0.0):
        """An engine that serves a share of what bfloat16 does to the adapter, and a trainer with noise of its own."""
        made = Made(seed, noise)
        c = made.trained[0]
        known = {"bfloat16": c + effect * made.normal(), "float16": c + effect / 10 * made.normal()}
        served = made.noisy(c + share * (known["bfloat16"] - c))
        c, *rounded = (values + own * made.normal() for values in (c, *known.values()))
        exact = own == 0
        return check_precision(
            Marker("all", c, served), dict(zip(known, rounded, strict=True)), noise, LIMITS, exact=exact
        )

    def test_exact_and_rounded(self):
        for seed in range(200):
            assert self.verdict(seed, FLOAT32, 0).status is Status.PASS
            verdict = self.verdict(seed, FLOAT32, 1)
            assert verdict.cause == "adapter_rounded"
            assert "rounds the adapter to bfloat16" in verdict.message

    def test_bfloat16_cannot_tell(self):
        assert self.verdict(0, BFLOAT16, 1).status is Status.NO_POWER

    @pytest.mark.parametrize("effect", [0.0, 0.5, 1.0, 2.0, 3.0, 6.0])
    def test_a_trainers_own_rounding_is_no_engine_that_rounds(self, effect):
        for seed in range(200):
            verdict = self.verdict(seed, BFLOAT16, 0, effect=effect * BFLOAT16, own=BFLOAT16)
            assert verdict.status is not Status.FAIL

    def test_rounding_far_above_a_trainers_own_is_found(self):
        for seed in range(200):
            assert self.verdict(seed, BFLOAT16, 1, effect=6 * BFLOAT16, own=BFLOAT16).cause == "adapter_rounded"
