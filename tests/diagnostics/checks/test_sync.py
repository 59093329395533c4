import math

import pytest
import torch

from grpo_lightning.diagnostics.checks.sync import NOTHING, Sighting, check_canary, followed
from grpo_lightning.diagnostics.thresholds import Thresholds
from grpo_lightning.diagnostics.verdict import Status

N = 96
LIMITS = Thresholds()


class Walk:
    """A policy that moves by ``step`` nats a version, seen by an engine; each side has rounding noise of its own."""

    def __init__(self, seed, step, noise, versions=6):
        self.generator = torch.Generator().manual_seed(seed)
        self.noise = noise
        true = [-self.normal().abs() * 2]
        for _ in range(versions):
            true.append(true[-1] + step * self.normal())
        self.true = true
        self.trained = [t + noise / math.sqrt(2) * self.normal() for t in true]

    def normal(self):
        return torch.randn(N, generator=self.generator, dtype=torch.float64)

    def seen(self, version, serves):
        return Sighting(version, self.trained[version], self.true[serves] + self.noise / math.sqrt(2) * self.normal())

    def verdicts(self, serves, base=True):
        """Of every version, if version ``v`` is answered with ``serves(v)``."""
        sightings, together = [], NOTHING
        for version in range(1, len(self.true)):
            now = self.seen(version, serves(version))
            if sightings:
                together += followed(now.served, sightings[-1].trained, now.trained, self.noise)
            yield check_canary(now, sightings, self.trained[0] if base else None, self.noise, together, LIMITS)
            if together.has_power(LIMITS.z):
                together = NOTHING
            sightings.append(now)


def test_alpha_of_known_data():
    start, now = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    found = followed(0.25 * now, start, now, noise=0.1)
    assert (found.alpha, found.se, found.pull) == (0.25, 0.1 / 2, -1.0)
    assert found.expected == pytest.approx((4 - 2 * 4 * 0.01) / 2)
    assert followed(now, now, now, noise=0.1) is NOTHING


@pytest.mark.parametrize(
    ("step", "noise"), [(1e-2, 1e-5), (1e-5, 1e-5), (0.2, 5e-2), (5e-2, 5e-2), (1e-3, 5e-2)], ids=str
)
class TestPower:
    def test_no_false_alarms(self, step, noise):
        for seed in range(100):
            for verdict in Walk(seed, step, noise, versions=12).verdicts(lambda v: v):
                assert verdict.status is not Status.FAIL, (seed, verdict)

    def test_a_policy_that_is_published_too_late(self, step, noise):
        causes = [[v.cause for v in Walk(seed, step, noise, 12).verdicts(lambda v: v - 1)] for seed in range(50)]
        found = sum(any(c) for c in causes)
        clear = step > 2 * noise
        assert found == 50 if clear else found >= 0
        assert {c for cs in causes for c in cs} <= {"", "sync_stale", "adapter_ignored", "sync_noop"}
        if clear:
            assert all(c[2] == "sync_stale" for c in causes)


def test_one_that_stops():
    walk = Walk(0, 1e-2, 1e-5)
    causes = [v.cause for v in walk.verdicts(lambda v: min(v, 3))]
    assert causes == ["", "", "", "sync_noop", "sync_noop", "sync_noop"]


def test_the_base_model():
    causes = [v.cause for v in Walk(0, 1e-2, 1e-5).verdicts(lambda v: 0 if v > 2 else v)]
    assert causes[:4] == ["", "", "adapter_ignored", "sync_noop"]


def test_other_weights():
    walk = Walk(0, 1e-2, 1e-5)
    now = Sighting(2, walk.trained[2], walk.trained[2] + 0.05 * walk.normal())
    verdict = check_canary(now, [walk.seen(1, 1)], walk.trained[0], 1e-5, NOTHING, LIMITS)
    assert verdict.cause == "other_weights"
    assert "allowed: 0.001" in str(verdict)


def test_many_small_steps_decide_together():
    """Each step is too small to tell from noise; a policy that is always one behind shows in their sum."""
    late = [[v.cause for v in Walk(s, 0.06, 5e-2, 60).verdicts(lambda v: v - 1, base=False)] for s in range(10)]
    assert all("sync_stale" in causes for causes in late)


def test_a_policy_that_stands_still_cannot_tell():
    walk = Walk(0, 0.0, 0.0)
    verdict = check_canary(walk.seen(2, 2), [walk.seen(1, 1)], walk.trained[0], 1e-5, NOTHING, LIMITS)
    assert verdict.status is Status.NO_POWER
    assert "more versions, or an engine in float32" in verdict.message
