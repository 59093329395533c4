"""The doctor's expected gradient of any objective, against autograd of the loss that is trained."""

import math
from dataclasses import replace

import pytest
import torch

from grpo_lightning.diagnostics import MicroBatchEvidence, Status
from grpo_lightning.diagnostics.checks.declared_loss import ROUNDING, ClippedLoss, RecomputedLoss, declared_loss
from grpo_lightning.diagnostics.checks.gradient import MICRO_BATCHES, PROCESSES, check_closed_form
from grpo_lightning.functional.ratio import RATIO_LEVELS
from grpo_lightning.functional.surrogates import SURROGATES, TOKEN_RATIO_ONLY
from grpo_lightning.objective import LossInputs, Objective, policy_loss

COMBINATIONS = [
    (surrogate, level)
    for surrogate, function in SURROGATES.items()
    for level in RATIO_LEVELS
    if level == "token" or function not in TOKEN_RATIO_ONLY
]
every_combination = pytest.mark.parametrize(("surrogate", "level"), COMBINATIONS)
LENGTHS = (5, 9, 12, 4, 1)


def objective(surrogate="clipped", level="token", *, kl_coef=0.0, entropy_coef=0.0, **changes):
    defaults = {"surrogate_args": {}, "clips": {}, "kl_estimator": "k3"}
    made = Objective.from_settings(surrogate=surrogate, ratio_level=level, **{**defaults, **changes})
    return replace(made, kl_coef=kl_coef, entropy_coef=entropy_coef)


def draw(seed=0, *, spread=0.3, near=None, lengths=LENGTHS, own=None, focus=False):
    """Inputs of an update in float32, as the module has them.

    Args:
        seed: Seed.
        spread: Standard deviation of the log-ratio.
        near: Ratios that half of the tokens lie at, up to rounding.
        lengths: Of the sequences.
        own: Advantages of the sequences.
        focus: Whether the surrogate is computed of some tokens alone.
    """
    generator = torch.Generator().manual_seed(seed)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    n = len(sequence)

    def normal():
        return torch.randn(n, generator=generator)

    c = -torch.empty(n).exponential_(generator=generator) - 0.01
    old = c + spread * normal()
    if near is not None:
        at = torch.tensor(near)[torch.randint(len(near), (n,), generator=generator)].log()
        close = c - at + 1e-7 * normal()
        old = torch.where(torch.rand(n, generator=generator) < 0.5, close, old)
    advantage = torch.randn(len(lengths), generator=generator) if own is None else torch.tensor(own)
    weight = torch.repeat_interleave(1 / (len(lengths) * torch.tensor(lengths)), torch.tensor(lengths))
    return LossInputs(
        logprobs=c.requires_grad_(),
        old_logprobs=old,
        advantages=torch.repeat_interleave(advantage, torch.tensor(lengths)),
        weight=weight,
        sequence=sequence,
        marked=torch.rand(n, generator=generator) < 0.3,
        behaviour=old + 0.2 * normal(),
        focus=torch.rand(n, generator=generator) < 0.7 if focus else None,
        reference=(c + 0.2 * normal()).detach(),
        entropy=torch.rand(n, generator=generator),
    )


def evidence_of(which, inputs, *, wrong=None, processes=1):
    """What the module would note of an update, with the gradient of its loss, or of a wrong one.

    Args:
        which: The declared objective.
        inputs: Inputs of its loss.
        wrong: ``(objective, inputs) -> scalar`` that is trained instead; the notes stay those of the right one.
        processes: What arrives is multiplied by their number.
    """
    noted = policy_loss(which, inputs)
    loss = noted.loss if wrong is None else wrong(which, inputs)
    (gradient,) = torch.autograd.grad(processes * loss, inputs.logprobs, allow_unused=True, materialize_grads=True)
    n, nothing = len(inputs.weight), torch.zeros(len(inputs.weight), dtype=torch.float64)
    return MicroBatchEvidence(
        ledger_index=torch.arange(n),
        sequence=100 * inputs.sequence,
        first_of_rollout=torch.ones(n, dtype=torch.bool),
        logprobs=inputs.logprobs.detach().double(),
        log_ratio=noted.log_ratio.double(),
        behaviour=inputs.behaviour.double(),
        proximal=inputs.old_logprobs.double(),
        stored=inputs.behaviour.double(),
        loss_weight=inputs.weight.double(),
        advantage=inputs.advantages.double(),
        updates_since_sampling=torch.zeros(n, dtype=torch.int64),
        marked=inputs.marked,
        clipped_low=noted.clipped_low,
        clipped_high=noted.clipped_high,
        factor=noted.factor.double(),
        dropped=noted.dropped,
        capped=noted.capped,
        entropy=inputs.entropy.double(),
        surprisal_variance=nothing,
        mass_above=nothing,
        reference=inputs.reference.double() if which.kl_coef else torch.full_like(nothing, math.nan),
        log_mass=nothing,
        gradient=gradient.double(),
    )


def check(which, evidence, *, devices=1, **counts):
    return check_closed_form(evidence, declared_loss(which, devices), counts=counts, max_error=1e-3)


@every_combination
class TestEverySurrogateAndLevel:
    @pytest.mark.parametrize("processes", [1, 3])
    def test_the_gradient_is_autograds(self, surrogate, level, processes):
        which = objective(surrogate, level, kl_coef=0.1, kl_estimator="k2", entropy_coef=0.1)
        for seed in range(10):
            evidence = evidence_of(which, draw(seed), processes=processes)
            loss = RecomputedLoss(which, processes)
            expected = loss.surrogate_gradient(evidence) + loss.kl_gradient(evidence)
            assert expected.dtype == torch.float64
            judged = ~loss.at_limit(evidence)
            scale = float(evidence.gradient.abs().max())
            torch.testing.assert_close(expected[judged], evidence.gradient[judged], rtol=1e-4, atol=1e-5 * scale)
            assert int(judged.sum()) >= 0.9 * len(judged)

    @pytest.mark.parametrize(
        "near", [None, (0.8, 1.2), (1.0,), (1.0 - 3e-4, 1.0 + 4e-4), (5.0, 0.2), (math.exp(0.4), math.exp(-0.4))]
    )
    def test_no_false_alarm(self, surrogate, level, near):
        for seed in range(60):
            args = {"share": 0.2} if surrogate in ("clip_cov", "kl_cov") else {}
            which = objective(surrogate, level, kl_coef=0.1 * (seed % 2), surrogate_args=args)
            spread = (1e-8, 1e-4, 0.1, 1.0)[seed % 4]
            verdict = check(which, evidence_of(which, draw(seed, near=near, spread=spread)))
            assert verdict.status is not Status.FAIL, (seed, verdict)

    def test_no_false_alarm_with_correction_and_focus(self, surrogate, level):
        for seed in range(30):
            correction = ("tis_token", "mis_token", "tis_sequence", "mis_sequence")[seed % 4]
            which = objective(surrogate, level, correction=correction, focus_share=0.5, kl_coef=0.1)
            verdict = check(which, evidence_of(which, draw(seed, focus=True)))
            assert verdict.status is not Status.FAIL, (seed, verdict)

    def test_it_is_judged(self, surrogate, level):
        which = objective(surrogate, level)
        for seed in range(10):
            assert check(which, evidence_of(which, draw(seed, spread=0.02))).status is Status.PASS

    def test_wrong_sign(self, surrogate, level):
        which = objective(surrogate, level)
        evidence = evidence_of(which, draw(), wrong=lambda o, i: -policy_loss(o, i).loss)
        assert check(which, evidence).cause == "wrong_sign"

    def test_factor(self, surrogate, level):
        which = objective(surrogate, level, kl_coef=0.1)
        evidence = evidence_of(which, draw(), wrong=lambda o, i: 0.37 * policy_loss(o, i).loss)
        verdict = check(which, evidence)
        assert verdict.cause == "wrong_scale"
        assert "is 0.37 times what it should be" in verdict.message

    def test_micro_batches_averaged_away(self, surrogate, level):
        which = objective(surrogate, level)
        evidence = evidence_of(which, draw(), wrong=lambda o, i: policy_loss(o, i).loss / 3)
        verdict = check(which, evidence, **{MICRO_BATCHES: 3})
        assert verdict.cause == "wrong_scale"
        assert "number of micro-batches of an update" in verdict.message

    def test_the_mean_of_processes(self, surrogate, level):
        which = objective(surrogate, level)
        verdict = check(which, evidence_of(which, draw()), devices=2, **{PROCESSES: 2})
        assert verdict.cause == "wrong_scale"
        assert "number of processes" in verdict.message

    def test_weights_of_another_aggregation(self, surrogate, level):
        def wrong(which, inputs):
            token = torch.full_like(inputs.weight, 1 / len(inputs.weight))
            return policy_loss(which, replace(inputs, weight=token)).loss

        which = objective(surrogate, level)
        verdict = check(which, evidence_of(which, draw(spread=0.02), wrong=wrong))
        assert verdict.cause == "wrong_count"
        assert "depends on its length" in verdict.message

    def test_old_logprobs_with_a_gradient(self, surrogate, level):
        """The value of the loss is right, but what the ratio's gradient is made of cancels."""
        if surrogate in ("cispo", "reinforce"):
            pytest.skip("its gradient is that of the logprobs, not of the ratio")

        def wrong(which, inputs):
            constant = inputs.logprobs.detach()
            return policy_loss(which, replace(inputs, logprobs=constant)).loss + 0 * inputs.logprobs.sum()

        # Without the penalty of marked tokens there is nothing else.
        which = objective(surrogate, level)
        assert check(which, evidence_of(which, draw(), wrong=wrong)).cause == "old_attached"

    def test_old_logprobs_recomputed(self, surrogate, level):
        if surrogate == "reinforce":
            pytest.skip("it has no ratio")

        def wrong(which, inputs):
            return policy_loss(which, replace(inputs, old_logprobs=inputs.logprobs.detach())).loss

        which = objective(surrogate, level)
        verdict = check(which, evidence_of(which, draw(), wrong=wrong))
        assert verdict.cause == "wrong_gradient"

    def test_kl_subtracted(self, surrogate, level):
        def wrong(which, inputs):
            return policy_loss(replace(which, kl_coef=-which.kl_coef), inputs).loss

        for estimator in ("k2", "k3", "abs"):
            which = objective(surrogate, level, kl_coef=0.2, kl_estimator=estimator)
            verdict = check(which, evidence_of(which, draw(), wrong=wrong))
            assert verdict.cause == "wrong_gradient"
            assert "The KL term enters the gradient -1 times, but kl_coef is 0.2" in verdict.message

    def test_kl_left_out(self, surrogate, level):
        def wrong(which, inputs):
            return policy_loss(replace(which, kl_coef=0.0), inputs).loss

        which = objective(surrogate, level, kl_coef=0.2, kl_estimator="k2")
        verdict = check(which, evidence_of(which, draw(), wrong=wrong))
        assert verdict.cause == "wrong_gradient"
        assert "KL term" in verdict.message

    def test_correction_left_out(self, surrogate, level):
        def wrong(which, inputs):
            return policy_loss(replace(which, correction=None), inputs).loss

        which = objective(surrogate, level, correction="mis_token", correction_args={"low": 0.8, "high": 1.2})
        assert check(which, evidence_of(which, draw(), wrong=wrong)).status is Status.FAIL

    def test_advantages_of_0(self, surrogate, level):
        which = objective(surrogate, level)
        inputs = replace(draw(own=[0.0] * 5), marked=torch.zeros(31, dtype=torch.bool))
        assert check(which, evidence_of(which, inputs)).status is Status.NO_POWER

    def test_nothing_arrived(self, surrogate, level):
        which = objective(surrogate, level)
        evidence = evidence_of(which, draw())
        evidence = replace(evidence, gradient=torch.full_like(evidence.gradient, math.nan))
        assert check(which, evidence).cause == "wrong_gradient"


class TestOtherLosses:
    """What is trained is a loss that is easily written instead of the declared one."""

    @pytest.mark.parametrize(
        ("declared", "trained", "words"),
        [
            (("sapo", "token"), ("reinforce", "token"), "the ratio is left out"),
            (("clipped", "sequence"), ("kl_cov", "token"), "the ratio is each token's own, and nothing is clipped"),
            (("clipped", "sequence"), ("clipped", "token"), "not that of the declared loss"),
            (("dppo", "token"), ("gmpo", "token"), "not that of the declared loss"),
            (("gmpo", "token"), ("clipped", "token"), "not that of the declared loss"),
        ],
    )
    def test_it_is_named(self, declared, trained, words):
        def wrong(which, inputs):
            return policy_loss(objective(*trained), replace(inputs, marked=torch.zeros_like(inputs.marked))).loss

        which = objective(*declared)
        verdict = check(which, evidence_of(which, draw(spread=0.5), wrong=wrong))
        assert verdict.cause == "wrong_gradient"
        assert words in verdict.message

    def test_marks_left_out(self):
        def wrong(which, inputs):
            return policy_loss(which, replace(inputs, marked=None)).loss

        for surrogate in ("clip_cov", "kl_cov"):
            which = objective(surrogate)
            assert check(which, evidence_of(which, draw(), wrong=wrong)).cause == "wrong_gradient"


class TestLimits:
    def test_only_tokens_at_a_limit_are_left_out(self):
        for surrogate, level in COMBINATIONS:
            which = objective(surrogate, level)
            evidence = evidence_of(which, draw(7, spread=0.05))
            share = float(RecomputedLoss(which).at_limit(evidence).double().mean())
            assert share <= 0.1, (surrogate, level)

    @pytest.mark.parametrize(
        ("surrogate", "ratio", "advantage"),
        [("clipped", 1.2, 1.0), ("clipped", 0.8, -1.0), ("clip_cov", 1.2, 1.0), ("gmpo", math.exp(0.4), 1.0)],
    )
    def test_a_token_at_a_clip_is_left_out(self, surrogate, ratio, advantage):
        inputs = draw(lengths=(1, 1), own=[advantage, advantage])
        old = inputs.logprobs.detach() - torch.tensor([ratio, 1.05]).log()
        which = objective(surrogate)
        evidence = evidence_of(which, replace(inputs, old_logprobs=old, marked=torch.zeros(2, dtype=torch.bool)))
        # Exactly at the bound, whatever float32 made of it.
        log_ratio = torch.tensor([ratio, 1.05], dtype=torch.float64).log()
        assert RecomputedLoss(which).at_limit(replace(evidence, log_ratio=log_ratio)).tolist() == [True, False]

    def test_the_kink_of_a_penalty(self):
        inputs = draw(lengths=(1, 1), own=[0.5, 0.5])
        marked = torch.tensor([True, False])
        evidence = evidence_of(
            objective("kl_cov"), replace(inputs, old_logprobs=inputs.logprobs.detach(), marked=marked)
        )
        assert RecomputedLoss(objective("kl_cov")).at_limit(evidence).tolist() == [True, False]


class TestRecomputedLoss:
    def test_grpo_has_its_closed_form(self):
        which = objective(kl_coef=0.1)
        assert declared_loss(which, 2) == ClippedLoss(0.2, 0.2, 0.1, 2)
        assert isinstance(declared_loss(objective("sapo"), 2), RecomputedLoss)

    @pytest.mark.parametrize("kl_coef", [0.0, 0.1])
    def test_both_agree_on_grpo(self, kl_coef):
        which = objective(kl_coef=kl_coef)
        evidence = evidence_of(which, draw(1))
        closed, again = ClippedLoss(0.2, 0.2, kl_coef, 3), RecomputedLoss(which, 3)
        for name in ("surrogate_gradient", "kl_gradient"):
            torch.testing.assert_close(getattr(closed, name)(evidence), getattr(again, name)(evidence))

    def test_it_does_not_see_what_is_not_finite(self):
        which = objective("sapo")
        evidence = evidence_of(which, draw())
        broken = evidence.log_ratio.clone()
        broken[3] = math.nan
        assert RecomputedLoss(which).surrogate_gradient(replace(evidence, log_ratio=broken)).isnan().all()
        assert check(which, replace(evidence, log_ratio=broken)).status is Status.NO_POWER

    def test_no_tokens(self):
        which = objective("sapo", kl_coef=0.1)
        evidence = evidence_of(which, draw())
        empty = MicroBatchEvidence(**{name: values[:0] for name, values in vars(evidence).items()})
        loss = RecomputedLoss(which)
        assert len(loss.surrogate_gradient(empty)) == len(loss.kl_gradient(empty)) == len(loss.at_limit(empty)) == 0
        assert check(which, empty).status is Status.NO_POWER

    def test_under_no_grad(self):
        which = objective("gmpo")
        evidence = evidence_of(which, draw())
        with torch.no_grad():
            assert float(RecomputedLoss(which).surrogate_gradient(evidence).norm()) > 0

    def test_rounding(self):
        assert torch.finfo(torch.float32).eps < ROUNDING
