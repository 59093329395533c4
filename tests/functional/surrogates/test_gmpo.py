import dataclasses
import math

import pytest
from functional.terms_maker import PROPERTY, Token, batches, gradients, make_terms, near
from hypothesis import given
from hypothesis import strategies as st

from grpo_lightning.functional.surrogates import gmpo


def oracle(tokens, low, high):
    """Losses, the gradient of their sum in the log-ratios, and flags."""
    losses, slopes, flags = [0.0] * len(tokens), [0.0] * len(tokens), []
    for i, t in enumerate(tokens):
        flags.append(
            (
                t.weight != 0 and t.advantage < 0 and t.log_ratio < -low,
                t.weight != 0 and t.advantage > 0 and t.log_ratio > high,
            )
        )
        mates = [k for k, o in enumerate(tokens) if o.sequence == t.sequence and o.weight != 0]
        if t.weight == 0:
            continue
        bounded = [min(tokens[k].log_ratio, high) if t.advantage > 0 else max(tokens[k].log_ratio, -low) for k in mates]
        losses[i] = -t.advantage * math.prod(math.exp(b) for b in bounded) ** (1 / len(mates))
    for i, t in enumerate(tokens):
        mates = [k for k, o in enumerate(tokens) if o.sequence == t.sequence and o.weight != 0]
        if t.weight != 0 and not any(flags[i]):
            slopes[i] = math.fsum(losses[k] for k in mates) / len(mates)
    return losses, slopes, flags


def test_golden_numbers():
    # Good: 0.6 is cut at 0.4, -0.6 is not, so the mean is -0.1; bad: -0.6 is cut at -0.4, 0.6 is not, the mean is 0.1.
    # Both tokens carry the loss, so each has the gradient of two halves.
    tokens = [
        Token(log_ratio=0.6, advantage=2.0),
        Token(log_ratio=-0.6, advantage=2.0),
        Token(log_ratio=0.6, advantage=-1.0, sequence=1),
        Token(log_ratio=-0.6, advantage=-1.0, sequence=1),
        Token(log_ratio=5.0, advantage=-1.0, sequence=1, weight=0.0),
    ]
    terms = make_terms(tokens)
    result = gmpo(terms)
    good, bad = -2 * math.exp(-0.1), math.exp(0.1)
    assert result.loss.tolist() == near([good, good, bad, bad, 0.0])
    assert gradients(terms, result) == [[0.0] * 5, near([0.0, good, bad, 0.0, 0.0])]
    assert result.clipped_high.tolist() == [True, False, False, False, False]
    assert result.clipped_low.tolist() == [False, False, False, True, False]


@PROPERTY
@given(batches(), st.floats(0, 0.9), st.floats(0, 0.9))
def test_equals_the_oracle(tokens, low, high):
    terms = make_terms(tokens)
    result = gmpo(terms, clip_low=low, clip_high=high)
    losses, slopes, flags = oracle(tokens, low, high)
    assert result.loss.tolist() == near(losses)
    assert gradients(terms, result)[1] == near(slopes)
    assert list(zip(result.clipped_low.tolist(), result.clipped_high.tolist(), strict=True)) == flags


def test_different_advantages_in_a_sequence_are_refused():
    tokens = [Token(), Token(advantage=2.0), Token(sequence=1), Token(advantage=2.0, sequence=2)]
    with pytest.raises(ValueError, match="expected one advantage per sequence, but got different ones in 1 sequences"):
        gmpo(make_terms(tokens))
    tokens[1] = dataclasses.replace(tokens[1], weight=0.0)
    assert gmpo(make_terms(tokens)).loss.tolist() == [-1.0, 0.0, -1.0, -2.0]


def test_bad_arguments_are_named():
    for low, high in ((-0.1, 0.4), (0.4, -0.1), (math.nan, 0.4), (0.4, math.nan)):
        with pytest.raises(ValueError, match="expected clip_low >= 0 and clip_high >= 0, but got"):
            gmpo(make_terms([Token()]), clip_low=low, clip_high=high)
