"""Tokens that were not drawn from the trainer's distribution are found, and healthy ones are left alone."""

import math
from dataclasses import replace

import pytest
import torch
from toy_sampling import at_temperature, draw, min_p, top_k, top_p

from grpo_lightning.diagnostics import Status
from grpo_lightning.diagnostics.checks.distribution import (
    MIN_FILLED,
    bernstein,
    binomial_at_most,
    check_distribution,
    check_filled,
    truncated_at,
)
from grpo_lightning.diagnostics.tally import BINS, FIRST_WINDOW, Tally, Windows, tally
from grpo_lightning.diagnostics.thresholds import Thresholds

THRESHOLDS = Thresholds()


def verdict(*args, **settings):
    return check_distribution(draw(*args, **settings).tally(), THRESHOLDS)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.7},
        {"noise": 0.05, "trainer_noise": 0.05},
        {"trainer_noise": 0.3},
        {"sharpness": 4.0},
        {"sharpness": 0.1},
    ],
    ids=["exact", "T 0.7", "bfloat16", "dropout", "certain", "flat"],
)
def test_healthy_windows_raise_no_alarm(settings):
    smallest = 1.0
    for seed in range(30):
        answer = verdict(seed, (64, 256, 1024)[seed % 3], **settings)
        assert answer.status is Status.PASS, f"seed {seed}: {answer}"
        smallest = min(smallest, answer.evidence["chance in a healthy run"])
    assert smallest > 1e-4, "not even near an alarm"


def test_noise_does_not_add_up_to_an_alarm():
    # 7 million such tokens would lie 5.3 standard deviations off without the allowance; here the same by more noise.
    total, windows, alarms = Tally(), Windows(), 0
    for seed in range(6):
        part = draw(seed, 4000, trainer_noise=0.4).tally()
        total = total + part
        alarms += sum(check_distribution(w, THRESHOLDS).status is Status.FAIL for w in windows.add(part))
    assert total.z > THRESHOLDS.z
    assert alarms == 0


@pytest.mark.parametrize(
    ("settings", "count", "cause"),
    [
        ({"distribution": at_temperature(0.7)}, 1024, "sharpened_sampling"),
        ({"distribution": at_temperature(0.9)}, 4096, "sharpened_sampling"),
        ({"distribution": at_temperature(0.9), "noise": 0.05}, 6144, "sharpened_sampling"),
        ({"distribution": at_temperature(1.4)}, 1024, "foreign_tokens"),
        ({"distribution": at_temperature(1.1)}, 6144, "foreign_tokens"),
        ({"distribution": top_p(0.95)}, 1024, "truncated_sampling"),
        ({"distribution": top_p(0.95), "noise": 0.05}, 1024, "truncated_sampling"),
        ({"distribution": top_p(0.99)}, 4096, "truncated_sampling"),
        ({"distribution": min_p(0.02)}, 1024, "truncated_sampling"),
        ({"distribution": top_k(20)}, 1024, "sharpened_sampling"),
        ({"foreign": 0.05}, 4096, "foreign_tokens"),
    ],
)
def test_power(settings, count, cause):
    causes = [verdict(seed, count, **settings).cause for seed in range(5)]
    assert causes == [cause] * 5


def test_what_a_failure_says():
    answer = verdict(0, 2048, top_p(0.95))
    text = str(answer)
    assert "never sampled" in text
    assert "top_p" in answer.fix
    assert 0.93 <= answer.evidence["mass that is kept, about"] <= 0.99
    assert answer.evidence["chance in a healthy run"] < answer.evidence["allowed"]
    assert answer.evidence["allowed"] == pytest.approx(1.16e-7, rel=0.01)
    assert "Not the cause: chance" in text


def test_few_uncertain_tokens_have_no_power():
    answer = check_distribution(Tally(), THRESHOLDS)
    assert answer.status is Status.NO_POWER
    assert "Only 0 fresh tokens were not certain; needs 32" in answer.message


def test_certain_tokens_that_are_wrong_once_are_chance():
    # One token of surprisal 11.5 among 512 that are all but certain is 14 standard deviations, and happens.
    window = Tally(tokens=512, uncertain=512, surprisal=11.5, capped=8.0, entropy=0.006, variance=0.68)
    counts = [512 // BINS] * BINS
    assert window.z > 13
    healthy = Tally(**{**vars(window), "counts": tuple(counts)})
    assert check_distribution(healthy, THRESHOLDS).status is Status.PASS


def test_bernstein_bounds_the_tail():
    assert bernstein(0.0, 1.0, 1.0) == bernstein(-3.0, 1.0, 1.0) == 1.0
    assert bernstein(6.0, 4.0, 3.0) == pytest.approx(math.exp(-36 / (2 * (4 + 6))))
    # Sums of 100 exponential variables, which have mean 1 and variance 1, below their mean.
    draws = torch.empty(20000, 100, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(1)).sum(1)
    for excess in (10, 20, 25):
        assert float((draws <= 100 - excess).double().mean()) <= bernstein(excess, 100.0, 1.0)


@pytest.mark.parametrize(("count", "trials", "chance"), [(0, 16, 0.5), (3, 10, 0.4), (10, 10, 0.2), (40, 1000, 0.05)])
def test_binomial_tails_are_bounded(count, trials, chance):
    exact = math.fsum(math.comb(trials, i) * chance**i * (1 - chance) ** (trials - i) for i in range(count + 1))
    bound = binomial_at_most(count, trials, chance)
    assert exact <= bound * (1 + 1e-9)
    assert bound == 1 if count >= trials * chance else bound <= exact * 2 * math.sqrt(trials)


def test_binomial_tails_of_many_trials_cost_nothing():
    assert binomial_at_most(10**11, 10**12, 0.2) == 0
    assert binomial_at_most(10**8, 10**9, 0.1 + 1e-5) == pytest.approx(math.exp(-0.1 / 0.18), rel=1e-3)


def test_truncation_is_told_from_a_lower_temperature():
    for mass in (0.8, 0.9, 0.95):
        counts = torch.tensor(draw(1, 4096, top_p(mass)).tally().counts, dtype=torch.float64)
        assert truncated_at(counts) == pytest.approx(mass, abs=0.06)
    for other in (0.6, 0.8):
        counts = torch.tensor(draw(1, 4096, at_temperature(other)).tally().counts, dtype=torch.float64)
        assert truncated_at(counts) is None


def test_filled_in_logprobs_of_unlikely_tokens():
    few = Tally(tokens=100, filled=MIN_FILLED - 1, certain_excess=15.0, certain_variance=3.0)
    assert check_filled(few).status is Status.PASS
    answer = check_filled(Tally(tokens=100, filled=MIN_FILLED, certain_excess=15.0, certain_variance=3.0))
    assert answer.cause == "forced_in_mask"
    assert "3 of 100 trained tokens have a stored logprob of 0" in answer.message
    assert answer.evidence["share of them"] == 0.03
    assert (answer.evidence["allowed"], answer.evidence["share allowed in long runs"]) == (2, 1e-5)


@pytest.mark.parametrize(("filled", "status"), [(30, Status.PASS), (31, Status.FAIL)])
def test_rare_disagreements_of_a_long_run_are_no_alarm(filled, status):
    answer = check_filled(Tally(tokens=3_000_000, filled=filled, certain_excess=150.0, certain_variance=30.0))
    assert answer.status is status
    assert answer.evidence["allowed"] == 30


def test_logprobs_of_exactly_0_are_right_where_the_trainer_is_certain_too():
    toy = draw(4, 600)
    certain = torch.arange(600) < 300
    answer = check_filled(replace(toy, s=toy.s.masked_fill(certain, 0.0), o=toy.o.masked_fill(certain, 0.0)).tally())
    assert answer.status is Status.PASS
    assert answer.evidence["tokens"] == 0


def test_zeros_in_place_of_lost_logprobs_are_told_from_forced_tokens():
    toy = draw(4, 600)
    lost = replace(toy, s=toy.s.masked_fill(torch.arange(600) < 150, 0.0))
    answer = check_filled(lost.tally())
    assert answer.cause == "logprobs_zero"
    assert "missing logprobs were most likely filled in with zeros" in answer.message


class TestTally:
    def test_sums(self):
        toy = draw(3, 600)
        toy.s[:5], toy.o[:3] = 0.0, -3.0
        got = toy.tally()
        p = toy.logp.exp()
        assert got.tokens == 600
        assert got.surprisal == pytest.approx(-float(toy.o.sum()))
        assert got.entropy == pytest.approx(-float((p * toy.logp).sum()))
        assert got.filled == sum(1 for s, o in zip(toy.s.tolist(), toy.o.tolist(), strict=True) if s == 0 and o < -2)
        assert sum(got.counts) == got.uncertain == 600
        assert got.compared == 600

    def test_positions_are_uniform(self):
        counts = torch.tensor(draw(5, 8000).tally().counts, dtype=torch.float64)
        expected = 8000 / BINS
        chi_square = float(((counts - expected).square() / expected).sum())
        assert abs(chi_square - (BINS - 1)) < 5 * math.sqrt(2 * (BINS - 1))

    def test_few_large_differences_are_no_noise(self):
        toy = draw(4, 1000, noise=0.05)
        toy.s[:20] -= 5.0
        assert toy.tally().noise_rms < 0.15

    def test_the_largest_twentieth_counts_as_the_next_smaller(self):
        o, rest = torch.full((100,), -1.0, dtype=torch.float64), torch.ones(100, dtype=torch.float64)
        got = tally(o, rest, rest, rest * 0.1, o + torch.arange(1, 101), torch.Generator())
        assert got.noise == sum(min(i, 95) ** 2 for i in range(1, 101))

    def test_more_tokens_than_quantile_takes(self):
        o = torch.zeros(1, dtype=torch.float64).expand(2**24 + 1)
        assert tally(o, o, o, o, o, torch.Generator()).compared == 2**24 + 1

    def test_unknown_sampler_logprobs(self):
        toy = draw(4, 100)
        toy.s[:] = math.nan
        assert toy.tally().noise_rms is None
        assert check_distribution(toy.tally(), THRESHOLDS).status is Status.PASS


class TestWindows:
    def parts(self, count):
        return [Tally(tokens=100, uncertain=100, surprisal=float(i)) for i in range(count)]

    def test_each_size_covers_the_run_without_gaps(self):
        windows = Windows()
        sizes = [window.uncertain for part in self.parts(48) for window in windows.add(part)]
        assert sizes == [600, 600, 1200, 600, 600, 1200, 2400, 600, 600, 1200, 600, 600, 1200, 2400, 4800][: len(sizes)]
        assert len(sizes) <= 2 * 48 * 100 / FIRST_WINDOW
        assert sum(size for size in sizes if size == 600) == 4800

    def test_the_longest_window_is_judged_and_forgotten(self):
        windows = Windows()
        part = Tally(tokens=512, uncertain=512)
        sizes = [window.uncertain for _ in range(1024) for window in windows.add(part)]
        assert [sizes.count(512 * 2**i) for i in range(12)] == [1024 // 2**i if i <= 8 else 0 for i in range(12)]
        assert len(windows.state_dict()["waiting"]) == 8
        assert [w.uncertain for w in windows.add(Tally(tokens=10**6, uncertain=10**6))] == [10**6]
        assert windows.state_dict()["waiting"] == [None] * 8

    def test_a_state_goes_on(self):
        whole, first = Windows(), Windows()
        parts = self.parts(40)
        expected = [window for part in parts for window in whole.add(part)]
        got = [window for part in parts[:17] for window in first.add(part)]
        second = Windows.from_state(first.state_dict())
        got += [window for part in parts[17:] for window in second.add(part)]
        assert got == expected

    def test_a_fault_that_begins_late_is_found_in_time(self):
        windows = Windows()
        for seed in range(16):
            for window in windows.add(draw(seed, 512).tally()):
                assert check_distribution(window, THRESHOLDS).status is Status.PASS
        found = []
        for late in range(8):
            part = draw(100 + late, 512, at_temperature(0.7)).tally()
            found += [check_distribution(window, THRESHOLDS).cause for window in windows.add(part)]
        assert "sharpened_sampling" in found[:6]
