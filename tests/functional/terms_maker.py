"""Makes terms for tests of ratio levels and surrogates."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st

from grpo_lightning.functional.terms import PolicyTerms

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@dataclass(frozen=True)
class Token:
    logprob: float = -1.0
    log_ratio: float = 0.0
    advantage: float = 1.0
    weight: float = 1.0
    sequence: int = 0
    marked: bool = False


signed = st.integers(-3000, 3000).map(lambda i: i / 1000)
weights = st.one_of(st.just(0.0), st.floats(0.001, 1))


@st.composite
def batches(draw, one_advantage=True, one_weight=False):
    """Tokens of a few sequences, in any order."""
    tokens = []
    for sequence in range(draw(st.integers(1, 4))):
        advantage, weight = draw(signed), draw(st.floats(0.001, 1))
        for _ in range(draw(st.integers(1, 5))):
            # Log-probabilities of the old policy stay below 0.
            log_ratio = draw(st.floats(-1, 1))
            logprob = draw(st.floats(-8, min(0, log_ratio)))
            own = advantage if one_advantage else draw(signed)
            tokens.append(
                Token(logprob, log_ratio, own, weight if one_weight else draw(weights), sequence, draw(st.booleans()))
            )
    return draw(st.permutations(tokens))


def column(tokens, name, dtype=torch.float64):
    return torch.tensor([getattr(t, name) for t in tokens], dtype=dtype)


def make_terms(tokens, dtype=torch.float64):
    """Terms whose log-probabilities and log-ratios are separate leaves."""
    return PolicyTerms(
        column(tokens, "logprob", dtype).requires_grad_(),
        column(tokens, "log_ratio", dtype).requires_grad_(),
        column(tokens, "advantage", dtype),
        column(tokens, "weight", dtype),
        column(tokens, "sequence", torch.int64),
        column(tokens, "marked", torch.bool),
    )


def level_terms(tokens, level, dtype=torch.float64):
    """Terms whose log-ratios, at a level, are computed from the log-probabilities; those alone are a leaf."""
    plain = make_terms(tokens, dtype)
    old = (plain.logprobs - plain.log_ratio).detach()
    log_ratio = level(plain.logprobs, old, plain.weight, plain.sequence)
    return PolicyTerms(plain.logprobs, log_ratio, plain.advantages, plain.weight, plain.sequence, plain.marked)


def total(terms, result):
    """The loss of the step."""
    return (terms.weight * result.loss).sum()


def gradients(terms, result):
    """Gradient of every token's own loss in log-probability and log-ratio, as lists."""
    pairs = torch.autograd.grad(result.loss.sum(), [terms.logprobs, terms.log_ratio], materialize_grads=True)
    return [g.tolist() for g in pairs]


def near(values):
    return pytest.approx(values, rel=1e-9, abs=1e-12)
