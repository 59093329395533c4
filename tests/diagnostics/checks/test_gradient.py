import math
from dataclasses import replace

import pytest
import torch

from grpo_lightning.diagnostics import MicroBatchEvidence, Status
from grpo_lightning.diagnostics.checks.declared_loss import ClippedLoss
from grpo_lightning.diagnostics.checks.gradient import (
    MICRO_BATCHES,
    check_cleared,
    check_closed_form,
    check_reached,
)
from grpo_lightning.functional import kl_k3
from grpo_lightning.functional.surrogates import clipped
from grpo_lightning.functional.terms import PolicyTerms

LOSS = ClippedLoss(clip_low=0.2, clip_high=0.3, kl_coef=0.1)
LENGTHS = (5, 9, 12, 4)


def draw(seed=0, *, loss=LOSS, spread=0.3, advantages=None, lengths=LENGTHS):
    """An update as the loss in functional/ computes it in float32, with autograd's gradient."""
    generator = torch.Generator().manual_seed(seed)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)) * 100, torch.tensor(lengths))
    n = len(sequence)

    def normal():
        return torch.randn(n, generator=generator)

    c = (-torch.empty(n).exponential_(generator=generator)).requires_grad_()
    old, reference = (c + spread * normal()).detach(), (c + 0.2 * normal()).detach()
    own = torch.randn(len(lengths), generator=generator) if advantages is None else torch.tensor(advantages)
    advantage = torch.repeat_interleave(own, torch.tensor(lengths))
    weight = torch.repeat_interleave(1 / (len(lengths) * torch.tensor(lengths)), torch.tensor(lengths))
    terms = PolicyTerms(c, c - old, advantage, weight, sequence, torch.zeros(n, dtype=torch.bool))
    surrogate = clipped(terms, clip_low=loss.clip_low, clip_high=loss.clip_high)
    total = (weight * (surrogate.loss + loss.kl_coef * kl_k3(c, reference))).sum()
    (gradient,) = torch.autograd.grad(total * loss.processes, c)
    nothing = torch.zeros(n, dtype=torch.float64)
    return MicroBatchEvidence(
        ledger_index=torch.arange(n),
        sequence=sequence,
        first_of_rollout=torch.ones(n, dtype=torch.bool),
        logprobs=c.detach().double(),
        log_ratio=terms.log_ratio.detach().double(),
        behaviour=old.double(),
        proximal=torch.full_like(nothing, torch.nan),
        stored=old.double(),
        loss_weight=weight.double(),
        advantage=advantage.double(),
        updates_since_sampling=torch.zeros(n, dtype=torch.int64),
        marked=terms.marked,
        clipped_low=surrogate.clipped_low,
        clipped_high=surrogate.clipped_high,
        factor=torch.ones_like(nothing),
        dropped=torch.zeros(n, dtype=torch.bool),
        capped=torch.zeros(n, dtype=torch.bool),
        entropy=nothing,
        surprisal_variance=nothing,
        mass_above=nothing,
        reference=reference.double() if loss.kl_coef else torch.full_like(nothing, torch.nan),
        log_mass=nothing,
        gradient=gradient.double(),
    )


def check(evidence, *, loss=LOSS, **counts):
    return check_closed_form(evidence, loss, counts=counts, max_error=1e-3)


def by_loop(e, loss):
    """The derivative, token by token."""
    gradient = []
    for t in range(len(e)):
        r, a, w = math.exp(e.log_ratio[t]), float(e.advantage[t]), float(e.loss_weight[t])
        bound = (a > 0 and r > 1 + loss.clip_high) or (a < 0 and r < 1 - loss.clip_low)
        kl = loss.kl_coef * w * (1 - math.exp(e.reference[t] - e.logprobs[t])) if loss.kl_coef else 0.0
        gradient.append(loss.processes * ((0.0 if bound else -w * a * r) + kl))
    return torch.tensor(gradient, dtype=torch.float64)


def test_golden_numbers():
    evidence = draw(lengths=(4,), advantages=[1.0])
    evidence = replace(
        evidence,
        log_ratio=torch.tensor([1.0, 1.2, 1.4, 0.5]).double().log(),
        advantage=torch.tensor([2.0, -1.0, 1.0, -1.0]).double(),
        logprobs=torch.tensor([-1.0, -1.0, -1.0, -2.0]).double(),
        reference=torch.tensor([-1.0, -1.0, -1.0, -1.0]).double(),
        loss_weight=torch.full((4,), 0.25).double(),
    )
    surrogate, kl = LOSS.surrogate_gradient(evidence), LOSS.kl_gradient(evidence)
    torch.testing.assert_close(surrogate, torch.tensor([-0.5, 0.3, 0.0, 0.0]).double())
    torch.testing.assert_close(kl, torch.tensor([0.0, 0.0, 0.0, 0.025 * (1 - math.e)]).double())


@pytest.mark.parametrize("loss", [LOSS, replace(LOSS, kl_coef=0.0, processes=3)], ids=["kl", "processes"])
def test_closed_form_is_that_of_the_loop_and_of_autograd(loss):
    for seed in range(50):
        evidence = draw(seed, loss=loss)
        expected = loss.surrogate_gradient(evidence) + loss.kl_gradient(evidence)
        torch.testing.assert_close(expected, by_loop(evidence, loss))
        torch.testing.assert_close(expected, evidence.gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("spread", [0.0, 1e-5, 0.05, 1.0])
def test_no_false_alarm(spread):
    for seed in range(300):
        verdict = check(draw(seed, spread=spread))
        assert verdict.status is Status.PASS
        assert verdict.evidence["relative error"] < 1e-5


def test_nothing_to_see():
    loss = replace(LOSS, kl_coef=0.0)
    assert check(draw(advantages=[0.0] * 4, loss=loss), loss=loss).status is Status.NO_POWER
    clipped = draw(advantages=[1.0] * 4, loss=loss, spread=0.0)
    clipped = replace(clipped, log_ratio=clipped.log_ratio + 1, gradient=0 * clipped.gradient)
    assert check(clipped, loss=loss).status is Status.NO_POWER
    none = replace(clipped, gradient=clipped.gradient + torch.nan)
    assert check(none, loss=loss).status is Status.NO_POWER


def test_a_solved_task_at_its_reference_is_rounding():
    """Advantages 0 and a KL gradient of the size of its own rounding."""
    for seed in range(50):
        evidence = draw(seed, advantages=[0.0] * 4)
        noise = 1e-7 * torch.randn(len(evidence), dtype=torch.float64)
        evidence = replace(evidence, reference=evidence.logprobs + noise, gradient=1e-9 * noise)
        assert check(evidence).status is Status.NO_POWER


@pytest.mark.parametrize(
    ("change", "cause", "words"),
    [
        (lambda e: -e.gradient, "wrong_sign", "points the wrong way: the update"),
        (lambda e: -2 * e.gradient, "wrong_sign", "wrong way and is 2 times as large"),
        (lambda e: 0.37 * e.gradient, "wrong_scale", "gradient is 0.37 times what it should be."),
        (lambda e: e.gradient / 7, "wrong_count", "1 over the number of sevens"),
        (lambda e: e.gradient * 7, "wrong_count", "7 is the number of sevens"),
        (lambda e: e.gradient / 2, "wrong_scale", "1 over the number of micro-batches of an update in all processes"),
        (lambda e: e.gradient * 2, "wrong_count", "2 is the number of micro-batches of an update in all processes"),
        (lambda e: LOSS.kl_gradient(e), "old_attached", "cancels"),
        (lambda e: 2.5 * LOSS.surrogate_gradient(e) + LOSS.kl_gradient(e), "wrong_scale", "surrogate's gradient is"),
        (lambda e: LOSS.kl_gradient(e) - LOSS.surrogate_gradient(e), "wrong_sign", "surrogate's gradient points"),
        (lambda e: LOSS.surrogate_gradient(e) - LOSS.kl_gradient(e), "wrong_gradient", "term enters the gradient -1 "),
        (lambda e: LOSS.surrogate_gradient(e), "wrong_gradient", "term enters the gradient 0 times"),
        (
            lambda e: LOSS.kl_gradient(e) - e.loss_weight * e.advantage * e.log_ratio.exp(),
            "wrong_gradient",
            "clipping is left out",
        ),
        (lambda e: LOSS.kl_gradient(e) - e.loss_weight * e.advantage, "wrong_gradient", "the ratio is left out"),
        (lambda e: e.gradient * (e.sequence // 100 + 1), "wrong_gradient", "tokens, "),
        (lambda e: e.gradient * lengths_of(e), "wrong_count", "depends on its length"),
        (lambda e: e.gradient * (1.5 + (e.sequence > 150)), "wrong_count", "2 different factors"),
        (lambda e: e.gradient + torch.nan, "wrong_gradient", "No gradient reached"),
        (lambda e: e.gradient * torch.linspace(1, 2, len(e)).double(), "wrong_gradient", "not that of the declared"),
    ],
)  # fmt: skip
def test_names_what_is_wrong(change, cause, words):
    for seed in range(20):
        evidence = draw(seed)
        verdict = check(replace(evidence, gradient=change(evidence)), sevens=7, **{MICRO_BATCHES: 2})
        assert verdict.status is Status.FAIL
        assert (verdict.cause, words in str(verdict)) == (cause, True), str(verdict)
        assert verdict.fix


def lengths_of(evidence):
    return torch.repeat_interleave(torch.tensor(LENGTHS), torch.tensor(LENGTHS)).double()


def test_rounding_at_the_clip_is_no_error():
    evidence = draw(0)
    ratio = torch.tensor(1.3).log().double()
    evidence = replace(evidence, log_ratio=evidence.log_ratio.index_fill(0, torch.tensor([1]), ratio))
    for bound in (0.0, 1.0):
        gradient = LOSS.surrogate_gradient(evidence) + LOSS.kl_gradient(evidence)
        gradient[1] = bound
        assert check(replace(evidence, gradient=gradient)).status is Status.PASS


@pytest.mark.parametrize(
    ("settings", "cause", "words"),
    [
        ({"trainable": 0}, "frozen_parameters", "No parameter is trainable"),
        ({"arrived": 0}, "wrong_gradient", "but not the parameters"),
        ({}, "old_attached", "adds up to exactly 0"),
        ({"arrived_nonzero": True}, "skipped_steps", "were cleared"),
    ],
)
def test_gradient_that_does_not_reach_the_parameters(settings, cause, words):
    base = {"at_logprobs": 0.1, "at_parameters": 0.0, "trainable": 8, "arrived": 8, "arrived_nonzero": False}
    verdict = check_reached(**{**base, **settings})
    assert verdict.status is Status.FAIL
    assert verdict.cause == cause
    assert words in verdict.message
    assert check_reached(**{**base, **settings, "at_parameters": 1e-9}).status is Status.PASS
    assert check_reached(**{**base, **settings, "at_logprobs": 0.0}).status is Status.NO_POWER


def test_gradients_left():
    assert check_cleared(0.0).status is Status.PASS
    verdict = check_cleared(0.5)
    assert verdict.cause == "gradient_accumulated"
    assert "norm of the gradients left: 0.5" in str(verdict)
