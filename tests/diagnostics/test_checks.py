import math
import re
from dataclasses import fields

import pytest
import torch

from grpo_lightning.diagnostics import MicroBatchEvidence, Status, Verdict
from grpo_lightning.diagnostics.checks.common import MIN_TOKENS
from grpo_lightning.diagnostics.checks.mismatch import (
    HALF_SERVED,
    MISMATCH_FACTOR,
    UNKNOWN_NOISE,
    check_mismatch,
    check_served_adapter,
)
from grpo_lightning.diagnostics.checks.numbers import check_finite, check_gradient
from grpo_lightning.diagnostics.checks.ratio import check_ratio
from grpo_lightning.diagnostics.checks.step import check_moved
from grpo_lightning.diagnostics.checks.stored import STORED_TOLERANCE, check_alignment, check_sampler, check_stored

FLOAT32, BFLOAT16 = 1e-5, 5e-2
"""Typical difference, in nats, between the trainer's logprobs and those of an engine in this precision."""
NOISES = pytest.mark.parametrize("noise", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
DRAWS = 500


class Draw:
    """A random update of a healthy run, as the trainer would see it."""

    def __init__(self, seed, noise, k=0, lengths=None):
        self.generator = torch.Generator().manual_seed(seed)
        self.noise, self.k = noise, k
        if lengths is None:
            count = int(torch.randint(2, 17, (), generator=self.generator))
            lengths = torch.randint(1, 40, (count,), generator=self.generator)
        lengths = torch.as_tensor(lengths, dtype=torch.int64)
        # Ledger rows: each sequence after a prompt of two tokens, and named by the first of its own.
        firsts = torch.cumsum(lengths + 2, 0) - lengths
        self.sequence = torch.repeat_interleave(firsts, lengths)
        first_targets = torch.repeat_interleave(torch.cumsum(lengths, 0) - lengths, lengths)
        self.ledger_index = self.sequence + torch.arange(int(lengths.sum())) - first_targets
        # Sampled tokens have logprobs like -Exp(1), in float32 like everything that the loss sees.
        self.c = -torch.empty(len(self.sequence)).exponential_(generator=self.generator)
        self.s = (self.c + noise * self.normal()).clamp_max(0)

    def __len__(self):
        return len(self.sequence)

    def normal(self):
        return torch.randn(len(self.sequence), generator=self.generator)

    def evidence(self, *, c=None, s=None, log_ratio=None):
        c, s = (self.c if c is None else c), (self.s if s is None else s)
        log_ratio = c - s if log_ratio is None else log_ratio
        n = len(self)
        return MicroBatchEvidence(
            ledger_index=self.ledger_index,
            sequence=self.sequence,
            first_of_rollout=torch.ones(n, dtype=torch.bool),
            logprobs=c.double(),
            log_ratio=log_ratio.double(),
            behaviour=s.double(),
            proximal=torch.full((n,), torch.nan, dtype=torch.float64),
            stored=s.double(),
            loss_weight=torch.ones(n, dtype=torch.float64),
            advantage=torch.ones(n, dtype=torch.float64),
            updates_since_sampling=torch.full((n,), self.k),
            marked=torch.zeros(n, dtype=torch.bool),
            clipped_low=torch.zeros(n, dtype=torch.bool),
            clipped_high=torch.zeros(n, dtype=torch.bool),
            factor=torch.ones(n, dtype=torch.float64),
            dropped=torch.zeros(n, dtype=torch.bool),
            capped=torch.zeros(n, dtype=torch.bool),
            entropy=torch.ones(n, dtype=torch.float64),
            surprisal_variance=torch.ones(n, dtype=torch.float64),
            mass_above=torch.zeros(n, dtype=torch.float64),
            reference=torch.full((n,), torch.nan, dtype=torch.float64),
            log_mass=torch.zeros(n, dtype=torch.float64),
            gradient=torch.full((n,), torch.nan, dtype=torch.float64),
        )

    def base(self, distance):
        return (self.c + distance * self.normal()).double()


def healthy(noise, seed=0, k=0, lengths=(20,) * 8):
    return Draw(seed, noise, k, lengths)


def assert_fails(verdict, *words):
    """The verdict fails, and its text holds the words, the evidence with its numbers, and what to do."""
    assert verdict.status is Status.FAIL
    text = str(verdict)
    assert verdict.evidence
    for name, value in verdict.evidence.items():
        shown = re.search(rf"^  {re.escape(name)}: (\S+)$", text, re.MULTILINE)
        assert shown, f"{name} is missing in {text}"
        assert float(shown[1]) == pytest.approx(float(value), rel=1e-3)
    assert verdict.fix
    assert f"Fix: {verdict.fix}" in text
    for word in words:
        assert word in text


def assert_no_power(verdict, reason):
    assert verdict.status is Status.NO_POWER
    assert reason in str(verdict)


def test_text_of_a_verdict():
    verdict = Verdict("name", Status.FAIL, "What.", "Do this.", {"std": 1.23456e-7, "tokens": 12345678, "who": "me"})
    assert str(verdict) == "What.\n  std: 1.235e-07\n  tokens: 12345678\n  who: me\nFix: Do this."
    assert str(Verdict("name", Status.NO_POWER, "Because.")) == "Because."


def test_joined_evidence_keeps_sequences_and_ledger_rows():
    def part(number, ledger_rows, sequences):
        n = len(sequences)
        values = torch.arange(n, dtype=torch.float64) + 100 * number
        rest = {f.name: values for f in fields(MicroBatchEvidence)}
        numbers = {"ledger_index": torch.tensor(ledger_rows), "sequence": torch.tensor(sequences)}
        return MicroBatchEvidence(**{**rest, **numbers})

    joined = MicroBatchEvidence.join([part(3, [2, 5, 9], [2, 2, 9]), part(1, [12, 20, 21, 24], [12, 20, 20, 20])])
    assert len(joined) == 7
    assert joined.logprobs.tolist() == [300, 301, 302, 100, 101, 102, 103]
    assert joined.ledger_index.tolist() == [2, 5, 9, 12, 20, 21, 24]
    assert joined.sequence.tolist() == [2, 2, 9, 12, 20, 20, 20]


@NOISES
@pytest.mark.parametrize("k", [0, 3])
def test_healthy_updates_raise_no_alarm(noise, k):
    passed = dict.fromkeys(["finite", "old logprobs", "sampler logprobs", "alignment", "mismatch"], 0)
    first = healthy(noise, seed=10**6)
    first_rms = check_mismatch(first.evidence(), None, 0.5).evidence["mismatch RMS"]
    for seed in range(DRAWS):
        draw = Draw(seed, noise, k)
        if k:
            # The policy moved, by more or less.
            draw.c = draw.c + draw.normal() * 10 ** float(torch.empty(()).uniform_(-6, -1, generator=draw.generator))
        evidence = draw.evidence()
        for verdict in (
            check_finite(evidence),
            check_stored(evidence),
            check_sampler(evidence),
            check_alignment(evidence),
            check_mismatch(evidence, first_rms, 0.5),
        ):
            assert verdict.status is not Status.FAIL, f"draw {seed}: {verdict.check}: {verdict}"
            passed[verdict.check] += verdict.status is Status.PASS
    # They are not silent either, where they can speak.
    assert passed["finite"] == passed["old logprobs"] == DRAWS
    for name in ("sampler logprobs", "alignment", "mismatch"):
        assert passed[name] == 0 if k else passed[name] > 0.9 * DRAWS


@NOISES
@pytest.mark.parametrize("trainer_share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("known", [True, False], ids=["noise known", "first rollout"])
def test_a_served_adapter_raises_no_alarm(noise, trainer_share, known):
    # The noise may be the engine's or the trainer's own; the latter is a part of the distance from the base.
    passed = 0
    for seed in range(DRAWS):
        draw = Draw(seed, noise)
        distance = 10 ** float(torch.empty(()).uniform_(-5, 0, generator=draw.generator))
        # The base's logprobs are known for the leading tokens alone.
        base = draw.base(distance)[: 1 + len(draw) * 2 // 3]
        c = draw.c + math.sqrt(trainer_share) * noise * draw.normal()
        s = draw.c + math.sqrt(1 - trainer_share) * noise * draw.normal()
        verdict = check_served_adapter(draw.evidence(c=c, s=s), base, noise if known else None)
        assert verdict.status is not Status.FAIL, f"draw {seed}, distance {distance}: {verdict}"
        passed += verdict.status is Status.PASS
    assert passed > (0.1 if known else 0.02) * DRAWS


@NOISES
def test_ratios_of_a_moving_policy_raise_no_alarm(noise):
    for seed in range(DRAWS):
        draw = Draw(seed, noise)
        k = seed % 4
        scale = 10 ** float(torch.empty(()).uniform_(-7, -0.5, generator=draw.generator)) if k else 0.0
        advantage = draw.normal()
        drift = scale * (advantage + draw.normal())
        log_ratio = (draw.c + drift - draw.s).double()
        # To first order the loss changes by the weighted sum of A times drift; the detector divides by that of |A|.
        expected = abs(float((advantage * drift).sum() / advantage.abs().sum()))
        ratio = log_ratio.exp()
        details = {"mean": float(ratio.mean()), "min": float(ratio.min()), "max": float(ratio.max())}
        std = float(ratio.std(correction=0))
        verdict = check_ratio(std, len(draw), k, expected, uncertain=100, min_std=1e-4, strict=False, details=details)
        assert verdict.status is not Status.FAIL, f"draw {seed}: {verdict}"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["c", "log_ratio"])
def test_finite_fails_on_a_single_token(bad, which):
    draw = healthy(FLOAT32)
    values = {"c": draw.c.clone(), "log_ratio": draw.c - draw.s}
    values[which][17] = bad
    verdict = check_finite(draw.evidence(**values))
    assert_fails(verdict, "1 of 160 current logprobs or log-ratios are NaN or infinite")
    assert verdict.evidence == {"tokens": 160, "not finite": 1}


def test_finite_passes_without_tokens():
    assert check_finite(healthy(FLOAT32, lengths=[]).evidence()).status is Status.PASS


def test_an_unknown_ledger_is_not_a_nan_of_the_policy():
    draw = healthy(FLOAT32)
    evidence = draw.evidence(s=torch.full((160,), math.nan), log_ratio=draw.c - draw.s)
    assert check_finite(evidence).status is Status.PASS


@NOISES
@pytest.mark.parametrize("k", [0, 2])
def test_recomputed_old_logprobs_are_found(noise, k):
    for seed in range(50):
        draw = Draw(seed, noise, k, (20,) * 8)
        verdict = check_stored(draw.evidence(log_ratio=torch.zeros(160)))
        assert_fails(verdict, "they equal the current policy's bit for bit", f"updates since sampling: {k}")
        assert verdict.evidence["log-ratio used, std"] == 0.0
        # About 1 with noise near certain tokens clipped at 0.
        assert verdict.evidence["current - stored, std"] == pytest.approx(noise, rel=0.3)
        assert verdict.evidence["tokens"] == 160


@NOISES
def test_replaced_old_logprobs_are_found(noise):
    draw = healthy(noise, k=1)
    recomputed_later = draw.c - 1e-4 * draw.normal()
    verdict = check_stored(draw.evidence(log_ratio=draw.c - recomputed_later))
    assert_fails(verdict, "they were replaced between the rollout and the loss")


def test_one_replaced_logprob_is_found():
    draw = healthy(BFLOAT16)
    log_ratio = draw.c - draw.s
    log_ratio[3] += 2e-5
    verdict = check_stored(draw.evidence(log_ratio=log_ratio))
    assert_fails(verdict)
    assert verdict.evidence["largest difference"] == pytest.approx(2e-5, rel=0.05)
    assert verdict.evidence["allowed, beside rounding"] == STORED_TOLERANCE


@NOISES
@pytest.mark.parametrize("scale", [1.0, 10.0, 60.0])
def test_stored_logprobs_of_a_float64_policy_pass(noise, scale):
    # The loss subtracts the float32 stored logprob from a float64 one. Off-policy tokens can have logprobs of -60.
    draw = healthy(noise, k=1)
    c = scale * (draw.c.double() + 1e-3 * draw.normal().double())
    s = (scale * draw.c).float()
    assert check_stored(draw.evidence(c=c, s=s, log_ratio=c - s)).status is Status.PASS


def test_stored_without_a_ledger_has_no_power():
    draw = healthy(FLOAT32)
    unknown = torch.full((160,), math.nan)
    assert_no_power(check_stored(draw.evidence(s=unknown, log_ratio=torch.zeros(160))), "no ledger")
    assert_no_power(check_stored(healthy(FLOAT32, lengths=[]).evidence()), "no ledger")


def test_stored_judges_the_tokens_it_knows():
    draw = healthy(FLOAT32)
    partly = draw.s.clone()
    partly[:100] = math.nan
    log_ratio = draw.c - draw.s
    assert check_stored(draw.evidence(s=partly, log_ratio=log_ratio)).status is Status.PASS
    log_ratio[150] = 1.0
    verdict = check_stored(draw.evidence(s=partly, log_ratio=log_ratio))
    assert_fails(verdict, "tokens: 60")


@NOISES
def test_zero_filled_logprobs_are_found(noise):
    for seed in range(50):
        verdict = check_sampler(Draw(seed, noise, 0, (20,) * 8).evidence(s=torch.zeros(160)))
        assert_fails(verdict, "filled in with zeros")
        assert verdict.evidence["sequences all zero"] == 8
        assert verdict.evidence["zeros"] == verdict.evidence["uncertain tokens"]
        assert verdict.evidence["mean current logprob of the zeros"] == pytest.approx(-1, abs=0.4)


@NOISES
@pytest.mark.parametrize("lengths", [(20,) * 8, (100, 100, 4, 12, 100), (1, 1, 1, 50, 50, 6)])
def test_zero_filled_single_sequences_are_found(noise, lengths):
    draw = healthy(noise, lengths=lengths)
    for which in range(len(lengths)):
        mine = draw.sequence == which
        s = draw.s.masked_fill(mine, 0.0)
        verdict = check_sampler(draw.evidence(s=s))
        if lengths[which] >= 4 and float(draw.c[mine].sum()) < -2:
            assert_fails(verdict, "filled in with zeros", "sequences all zero: 1")
        else:
            assert verdict.status is Status.PASS


def test_certain_tokens_may_be_zero():
    # A whole sequence that both are certain of (a fixed format), rounded to 0 by the engine.
    draw = healthy(BFLOAT16)
    mine = draw.sequence == 2
    c, s = draw.c.masked_fill(mine, -1e-4), draw.s.masked_fill(mine, 0.0)
    assert check_sampler(draw.evidence(c=c, s=s)).status is Status.PASS


@NOISES
def test_copied_logprobs_are_found(noise):
    draw = healthy(noise)
    verdict = check_sampler(draw.evidence(s=draw.c))
    assert_fails(verdict, "equal the trainer's bit for bit", "bitwise_consistent_engine")
    assert verdict.evidence["equal"] == verdict.evidence["uncertain tokens"] == int((draw.c < -0.01).sum())


def test_equal_logprobs_say_nothing_where_both_may_compute_alike():
    draw = healthy(BFLOAT16)
    assert_no_power(check_sampler(draw.evidence(s=draw.c), alike=True), "where both compute alike")
    assert check_sampler(draw.evidence(s=torch.zeros(160)), alike=True).cause == "logprobs_zero"


def test_some_equal_logprobs_are_chance():
    draw = healthy(FLOAT32)
    s = torch.where(torch.arange(160) < 150, draw.c, draw.s)
    assert check_sampler(draw.evidence(s=s)).status is Status.PASS


def test_sampler_has_no_power():
    few = healthy(FLOAT32, lengths=(MIN_TOKENS - 1,))
    assert_no_power(check_sampler(few.evidence(s=torch.zeros(MIN_TOKENS - 1))), "tokens were not certain; needs 32")
    certain = healthy(FLOAT32)
    assert_no_power(check_sampler(certain.evidence(c=certain.c * 1e-4, s=torch.zeros(160))), "Only 0 tokens")


def shift_within(values, sequence, lag):
    """Value t becomes that of token t + lag of its sequence, repeating the last or first one."""
    out = values.clone()
    for i in sequence.unique():
        mine = values[sequence == i]
        out[sequence == i] = mine[(torch.arange(len(mine)) + lag).clamp(0, len(mine) - 1)]
    return out


def correlation(x, y, sequence):
    """Of x with y, the latter from the next token on if it is shorter, over pairs within a sequence."""
    shift = len(sequence) - len(x)
    same = sequence[: len(x)] == sequence[shift:]
    return float(torch.corrcoef(torch.stack([x[same], y[same]]))[0, 1])


@NOISES
@pytest.mark.parametrize("lag", [-2, -1, 1, 2])
@pytest.mark.parametrize("kind", ["within sequences", "over the flat list"])
def test_shifted_logprobs_are_found(noise, lag, kind):
    for seed in range(30):
        draw = Draw(seed, noise, 0, (20,) * 8)
        s = shift_within(draw.s, draw.sequence, lag) if kind == "within sequences" else draw.s.roll(-lag)
        verdict = check_alignment(draw.evidence(s=s))
        assert_fails(verdict, f"shifted by {abs(lag)} against the tokens")
        # s[t] is the logprob of token t + lag.
        assert verdict.evidence[f"correlation at shift {lag}"] > 0.9
        assert abs(verdict.evidence["correlation as stored"]) < 0.5


@NOISES
def test_unrelated_logprobs_are_not_called_shifted(noise):
    # Wrong, but not by a shift: other checks name it.
    for seed in range(50):
        draw = Draw(seed, noise, 0, (20,) * 8)
        other = Draw(seed + 10**6, noise, 0, (20,) * 8)
        assert check_alignment(draw.evidence(s=other.s)).status is Status.PASS


@NOISES
def test_similar_neighbours_are_not_called_shifted(noise):
    # Logprobs in runs of four: the correlation with the neighbour is high, that with the token itself higher.
    for seed in range(50):
        draw = Draw(seed, noise, 0, (20,) * 8)
        c = draw.c[::4].repeat_interleave(4) + 0.01 * draw.normal()
        assert check_alignment(draw.evidence(c=c, s=c + noise * draw.normal())).status is Status.PASS


def test_a_weak_correlation_with_the_neighbour_is_not_called_a_shift():
    # 0.7, though 8 standard errors from 0: something is wrong, but a mere shift would give nearly 1.
    for seed in range(50):
        draw = Draw(seed, BFLOAT16, 0, (20,) * 8)
        s = shift_within(draw.c, draw.sequence, 1) + draw.normal()
        assert check_alignment(draw.evidence(s=s)).status is Status.PASS


def test_a_gap_within_chance_is_not_called_a_shift():
    # Steady ramps correlate at every shift by 0.9 and more, and chance decides where most.
    elsewhere = 0
    for seed in range(50):
        draw = Draw(seed, BFLOAT16, 0, (80,) * 2)
        c, s = (-torch.arange(80.0).repeat(2) / 40 + 0.15 * draw.normal() for _ in range(2))
        elsewhere += correlation(s[:-1], c[1:], draw.sequence) > correlation(s, c, draw.sequence)
        assert check_alignment(draw.evidence(c=c, s=s)).status is Status.PASS
    assert elsewhere > 0


def test_alignment_has_no_power():
    few = healthy(FLOAT32, lengths=(MIN_TOKENS - 1,))
    assert_no_power(check_alignment(few.evidence(s=few.s.roll(1))), "Only 31 tokens")
    draw = healthy(FLOAT32)
    assert_no_power(check_alignment(draw.evidence(s=torch.full((160,), -1.0))), "logprobs without variance")
    single = healthy(FLOAT32, lengths=(1,) * 64)
    assert check_alignment(single.evidence()).status is Status.PASS


@NOISES
def test_the_base_served_instead_of_the_adapter_is_found(noise):
    for seed in range(100):
        draw = Draw(seed, noise, 0, (20,) * 8)
        distance = 10 * noise
        base = draw.base(distance)
        s = (base + noise * draw.normal()).float()
        verdict = check_served_adapter(draw.evidence(s=s), base, noise)
        assert_fails(verdict, "samples from (nearly) the base model", "expected: 1")
        assert verdict.evidence["alpha"] == pytest.approx(0, abs=0.1)
        assert verdict.evidence["trainer against base, RMS"] == pytest.approx(distance, rel=0.3)
        assert verdict.evidence["tokens"] == 160
        assert verdict.evidence["standard error"] == pytest.approx(0.1 / math.sqrt(160), rel=0.3)
        assert check_served_adapter(draw.evidence(), base, noise).status is Status.PASS


def test_on_the_first_rollout_the_distances_show_the_noise():
    draw = healthy(BFLOAT16)
    base = draw.base(4 * UNKNOWN_NOISE)
    assert_fails(
        check_served_adapter(draw.evidence(s=base.float()), base, None), "samples from (nearly) the base model"
    )
    assert check_served_adapter(draw.evidence(), base, None).status is Status.PASS
    # An engine that serves neither is for the mismatch to find.
    other = draw.c + 4 * UNKNOWN_NOISE * draw.normal()
    assert check_served_adapter(draw.evidence(s=other), base, None).status is Status.NO_POWER


@pytest.mark.parametrize(("alpha", "status"), [(1.0, Status.PASS), (0.6, Status.PASS), (0.4, Status.FAIL)])
def test_the_slope_is_the_share_of_the_adapter(alpha, status):
    draw = healthy(FLOAT32)
    base = draw.base(0.3)
    s = (base + alpha * (draw.c.double() - base)).float()
    verdict = check_served_adapter(draw.evidence(s=s), base, FLOAT32)
    assert verdict.evidence["alpha"] == pytest.approx(alpha, abs=1e-5)
    assert verdict.status is status
    assert HALF_SERVED == 0.5


def test_only_the_leading_tokens_are_compared():
    draw = healthy(FLOAT32)
    base = draw.base(0.3)[:64]
    s = draw.s.clone()
    s[:64] = base.float()
    verdict = check_served_adapter(draw.evidence(s=s), base, FLOAT32)
    assert_fails(verdict, "tokens: 64")


def test_served_adapter_has_no_power():
    draw = healthy(BFLOAT16)
    close = draw.base(1e-2)
    assert_no_power(check_served_adapter(draw.evidence(), close, BFLOAT16), "too close to the base model (0.0")
    # The same distance is plain to see for a float32 engine.
    precise = healthy(FLOAT32)
    assert check_served_adapter(precise.evidence(), precise.base(1e-2), FLOAT32).status is Status.PASS
    # An adapter that is still zero.
    assert_no_power(check_served_adapter(draw.evidence(), draw.c.double(), BFLOAT16), "too close to the base model (0 ")
    few = draw.base(1.0)[: MIN_TOKENS - 1]
    assert check_served_adapter(draw.evidence(), few, BFLOAT16).status is Status.NO_POWER


@NOISES
def test_mismatch_against_the_first_rollout(noise):
    draw = healthy(noise)
    rms = math.sqrt(math.fsum((c - s) ** 2 for c, s in zip(draw.c.tolist(), draw.s.tolist(), strict=True)) / 160)
    first = check_mismatch(draw.evidence(), None, 0.5)
    assert first.status is Status.PASS
    assert first.evidence["mismatch RMS"] == pytest.approx(rms, rel=1e-6)
    limit = min(0.5, max(MISMATCH_FACTOR * rms, 1e-3))
    for factor, status in ((0.95, Status.PASS), (1.05, Status.FAIL)):
        s = draw.c + factor * limit * (-1.0) ** torch.arange(160)
        verdict = check_mismatch(draw.evidence(s=s), rms, 0.5)
        assert verdict.status is status
        assert verdict.evidence["allowed"] == pytest.approx(limit)
    assert_fails(verdict, "sampled with other weights than the trainer holds")


def test_an_engine_with_other_weights_is_found():
    draw = healthy(FLOAT32)
    verdict = check_mismatch(draw.evidence(s=draw.c + 0.05 * draw.normal()), FLOAT32, 0.5)
    assert_fails(verdict, "on the first rollout: 1e-05", "allowed: 0.001")
    assert verdict.evidence["mismatch RMS"] == pytest.approx(0.05, rel=0.3)


@pytest.mark.parametrize(
    "check",
    [
        check_sampler,
        check_alignment,
        lambda e: check_mismatch(e, 1e-5, 0.5),
        lambda e: check_served_adapter(e, e.logprobs - 1, 1e-5),
    ],
    ids=["sampler", "alignment", "mismatch", "served"],
)
def test_only_fresh_and_known_tokens_are_judged(check):
    reason = "Needs tokens sampled with the current weights, and a ledger."
    stale = healthy(FLOAT32, k=1)
    assert_no_power(check(stale.evidence(s=torch.zeros(160))), reason)
    fresh = healthy(FLOAT32)
    partly = fresh.s.clone()
    partly[9] = math.nan
    assert_no_power(check(fresh.evidence(s=partly)), reason)
    assert_no_power(check(healthy(FLOAT32, lengths=[]).evidence()), reason)
    mixed = fresh.evidence(s=torch.zeros(160))
    mixed.updates_since_sampling[0] = 1
    assert_no_power(check(mixed), reason)


def test_a_resume_on_coarser_hardware_is_no_other_weights():
    coarse = healthy(5e-2).evidence()
    assert check_mismatch(coarse, FLOAT32, 0.5).cause == "other_weights"
    assert check_mismatch(coarse, FLOAT32, 0.5, 5e-2).status is Status.PASS
    assert check_mismatch(coarse, 5e-2, 0.5, FLOAT32).status is Status.PASS


def test_garbage_on_the_first_rollout_is_found():
    draw = healthy(BFLOAT16)
    verdict = check_mismatch(draw.evidence(s=draw.s.roll(40)), None, 0.5)
    assert_fails(verdict, "disagree on the very first rollout", "max_mismatch")


def test_gradient():
    assert check_gradient(1.0).status is Status.PASS
    assert_fails(check_gradient(math.inf), "would destroy the weights")
    assert check_gradient(math.nan).status is Status.FAIL


def test_a_policy_that_is_certain_of_its_tokens_cannot_show_a_spread():
    verdict = check_ratio(1e-6, 160, 1, 1.0, uncertain=31, min_std=1e-4, strict=False, details=DETAILS)
    assert_no_power(verdict, "Only 31 tokens were not certain")


DETAILS = {"mean": 1.0, "min": 0.75, "max": 1.25}


def ratio(std, k, drift, *, count=160, strict=False, mean=1.0):
    details = DETAILS | {"mean": mean}
    return check_ratio(std, count, k, drift, uncertain=100, min_std=1e-4, strict=strict, details=details)


def test_a_stuck_policy_is_found():
    for k in (1, 7):
        verdict = ratio(2e-5, k, 1e-2)
        assert_fails(
            verdict,
            "PPO ratios are degenerate (std=2e-05). Training cannot proceed.",
            "its logprobs did not change",
            "ratio mean: 1",
            "ratio min: 0.75",
            "ratio max: 1.25",
            "limit for the std: 0.0001",
            f"updates since sampling: {k}",
            "expected drift (nats): 0.01",
        )


@pytest.mark.parametrize("mean", [0.0, 1e-7])
def test_ratios_of_a_policy_that_fell_apart_are_near_zero_and_not_alike(mean):
    assert ratio(7 * mean, 3, 1000.0, mean=mean).status is Status.PASS
    assert ratio(7 * mean, 3, 1000.0, mean=mean, strict=True).status is Status.FAIL


@pytest.mark.parametrize("mean", [0.5, 2.0])
def test_ratios_stuck_beside_one_are_degenerate_as_well(mean):
    assert ratio(2e-5, 3, 1.0, mean=mean).status is Status.FAIL


@pytest.mark.parametrize("k", [0, 1, 5])
@pytest.mark.parametrize("strict", [False, True])
def test_ratios_that_vary_pass(k, strict):
    assert ratio(1.001e-4, k, 1.0, strict=strict).status is Status.PASS
    assert ratio(1e-4, k, 1.0, strict=strict).status is Status.PASS


def test_ratio_one_right_after_sampling_is_right():
    for std in (0.0, 1e-5):
        assert_no_power(ratio(std, 0, 1.0), "First update after sampling: a ratio of 1 is right.")


def test_a_policy_that_hardly_moved_cannot_be_judged():
    # Ten times the limit is needed.
    assert_no_power(ratio(1e-5, 2, 0.9e-3), "hardly moved")
    assert_no_power(ratio(0.0, 2, 0.0), "hardly moved")
    assert ratio(1e-5, 2, 1.1e-3).status is Status.FAIL


@pytest.mark.parametrize(("k", "drift"), [(0, 0.0), (0, 1.0), (3, 0.0)])
def test_strict_mode_judges_by_the_std_alone(k, drift):
    assert_fails(ratio(1e-5, k, drift, strict=True), "strict mode judges by the std alone", "std=1e-05")


@pytest.mark.parametrize("count", [0, 1])
def test_no_spread_without_two_tokens(count):
    std = math.nan if count == 0 else 0.0
    assert_no_power(ratio(std, 1, 1.0, count=count, strict=True), f"{count} sampled tokens have no spread")


def test_parameters_that_do_not_move_are_found():
    verdict = check_moved(grad_norm=0.25, lr=1e-4, update_norm=0.0, updates=7)
    assert_fails(verdict, "changed no trainable parameter", "gradient norm: 0.25", "learning rate: 0.0001")
    assert check_moved(grad_norm=0.25, lr=1e-4, update_norm=1e-12, updates=7).status is Status.PASS


@pytest.mark.parametrize(("grad_norm", "lr"), [(0.0, 1e-4), (0.25, 0.0)])
def test_nothing_should_move_without_gradient_or_learning_rate(grad_norm, lr):
    assert_no_power(check_moved(grad_norm=grad_norm, lr=lr, update_norm=0.0, updates=1), "nothing should move")
