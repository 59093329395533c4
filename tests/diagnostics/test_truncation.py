"""What a declared truncation keeps, against loops over the vocabulary; right and wrong samples are told apart."""

import math

import pytest
import torch
from fakes import likeliest
from toy_sampling import draw, top_k, top_p

from grpo_lightning.diagnostics.checks.distribution import check_distribution
from grpo_lightning.diagnostics.checks.semantics import check_semantics
from grpo_lightning.diagnostics.checks.truncation import as_declared
from grpo_lightning.diagnostics.hypotheses import of_distributions
from grpo_lightning.diagnostics.thresholds import Thresholds
from grpo_lightning.diagnostics.truncation import beside_truncation, kept_of
from grpo_lightning.diagnostics.verdict import Status

FLOAT32, BFLOAT16 = 5e-5, 5e-2


def kept(toy, *, p=1.0, k=0, noise=FLOAT32):
    rows = torch.arange(len(toy.o)) * 3
    return kept_of(toy.logp.split(100), toy.tokens, rows, top_p=p, top_k=k, noise=noise)


@pytest.mark.parametrize(("p", "k"), [(0.9, 0), (1.0, 20), (0.8, 30), (0.99, 0)])
def test_against_a_loop(p, k):
    toy = draw(3, 60, top_p(p) if k == 0 else top_k(k))
    found = kept(toy, p=p, k=k, noise=0.0)
    for n, row in enumerate(toy.logp.exp().tolist()):
        tokens, mass = likeliest(row, p, k)
        own = row[int(toy.tokens[n])]
        assert float(found.log_mass[n]) == pytest.approx(math.log(mass), abs=1e-9)
        assert float(found.low[n]) == float(found.high[n]) == float(found.log_mass[n])
        if int(toy.tokens[n]) in tokens:
            shares = [row[i] / mass for i in tokens]
            entropy = -math.fsum(q * math.log(q) for q in shares)
            assert float(found.entropy[n]) == pytest.approx(entropy, abs=1e-9)
            assert float(found.surprisal_variance[n]) == pytest.approx(
                math.fsum(q * (math.log(q) + entropy) ** 2 for q in shares), abs=1e-9
            )
            above = math.fsum(row[i] for i in tokens if row[i] > own) / mass
            assert float(found.mass_above[n]) == pytest.approx(above, abs=1e-9)


def test_masses_of_tokens_by_their_rows():
    toy = draw(0, 20, top_p(0.9))
    found = kept(toy, p=0.9)
    rows = torch.tensor([6, 7, 0, 57, 99])
    at = torch.tensor([2, 0, 0, 19, 0])
    mass = found.mass_of(rows, (toy.o - toy.s)[at])
    assert mass.isfinite().tolist() == [True, False, True, True, False]
    assert mass[0] == pytest.approx(float((toy.o - toy.s)[2]), abs=1e-9)
    # No more than what rounding at the edge explains is taken back.
    assert float(found.mass_of(rows, torch.zeros(5))[0]) == float(found.high[2])
    assert found.of(torch.zeros(20, dtype=torch.bool)).mass_of(rows, torch.zeros(5)).isnan().all()


def judged(toy, noise=FLOAT32, **declared):
    found = kept(toy, **declared, noise=noise)
    o, hypotheses = of_distributions([toy.logp], toy.tokens, 1.0)
    hypotheses = beside_truncation(hypotheses, o, found.log_mass)
    semantics = check_semantics(toy.s, o - found.log_mass, toy.sequence, hypotheses, Thresholds(), noise)
    tokens = found.tally(toy.s, found.judged, toy.generator)
    return semantics, check_distribution(tokens, Thresholds()), found


NOISES = [(0.0, FLOAT32), (1e-5, FLOAT32), (0.05, BFLOAT16)]


@pytest.mark.parametrize(("noise", "declared_noise"), NOISES)
@pytest.mark.parametrize("p", [0.5, 0.9, 0.99])
def test_what_is_declared_raises_no_alarm(p, noise, declared_noise):
    for seed in range(2):
        toy = draw(seed, 4096, top_p(p), noise=noise / 2, trainer_noise=noise / 2)
        semantics, distribution, found = judged(toy, declared_noise, p=p)
        assert semantics.status is Status.PASS
        assert distribution.status is Status.PASS
        apart = toy.o - toy.s
        residual = apart - apart.clamp(found.low, found.high)
        assert float(residual.square().mean().sqrt()) <= max(1.1 * noise, 1e-9)


@pytest.mark.parametrize(("noise", "declared_noise"), NOISES)
def test_top_k_that_is_declared(noise, declared_noise):
    toy = draw(0, 4096, top_k(20), noise=noise)
    semantics, distribution, _ = judged(toy, declared_noise, k=20)
    assert semantics.status is distribution.status is Status.PASS


@pytest.mark.parametrize(("noise", "declared_noise"), NOISES)
@pytest.mark.parametrize(
    ("real", "name"), [(top_p(0.8), "top_p = 0.8"), (top_p(0.5), "top_p = 0.5"), (top_p(1.0), "no truncation")]
)
def test_another_truncation_than_declared(real, name, noise, declared_noise):
    toy = draw(1, 2048, real, noise=noise)
    semantics, _, _ = judged(toy, declared_noise, p=0.9)
    assert semantics.cause == "truncated_sampling"
    said = as_declared(semantics, 0.9, 0)
    assert name in said.message
    assert "does not truncate as it is asked to (top_p = 0.9, top_k = 0)" in said.message


def test_tokens_tell_of_another_truncation_whatever_the_logprobs_say():
    for real, cause in ((top_p(0.7), "truncated_sampling"), (top_p(1.0), "foreign_tokens")):
        toy = draw(2, 8192, real)
        said = kept(toy, p=0.9)
        pretended = toy.o - said.log_mass
        verdict = check_distribution(said.tally(pretended, said.judged, toy.generator), Thresholds())
        assert verdict.cause == cause
