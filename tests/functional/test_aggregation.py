import inspect
import math
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_lightning.functional import Aggregation, token_weights
from grpo_lightning.functional.aggregation import AGGREGATIONS

PROPERTY = settings(max_examples=80, deadline=None, derandomize=True, database=None)
lengths = st.lists(st.integers(1, 2000), min_size=1, max_size=30)
MAX_LENGTH = 2000
every = pytest.mark.parametrize("aggregation", AGGREGATIONS)


def weights(values, aggregation):
    return token_weights(values, aggregation, max_length=MAX_LENGTH)


def weighted(weights, tokens):
    return math.fsum(w * x for w, line in zip(weights, tokens, strict=True) for x in line)


def flat(tokens):
    return [x for line in tokens for x in line]


ORACLES = {
    "sequence": lambda tokens: math.fsum(math.fsum(line) / len(line) for line in tokens) / len(tokens),
    "token": lambda tokens: math.fsum(flat(tokens)) / len(flat(tokens)),
    "constant": lambda tokens: math.fsum(math.fsum(line) / MAX_LENGTH for line in tokens) / len(tokens),
    "sequence_sum": lambda tokens: math.fsum(math.fsum(line) for line in tokens) / len(tokens),
}


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    # Three sequences, ten tokens, a constant of 20.
    [
        ("sequence", [1 / 6, 1 / 9, 1 / 15]),
        ("token", [0.1, 0.1, 0.1]),
        ("constant", [1 / 60, 1 / 60, 1 / 60]),
        ("sequence_sum", [1 / 3, 1 / 3, 1 / 3]),
    ],
)
def test_golden_numbers(aggregation, expected):
    assert token_weights([2, 3, 5], aggregation, max_length=20) == pytest.approx(expected, rel=1e-15)


def test_sequence_is_the_default():
    assert token_weights([1, 4]) == [0.5, 0.125]
    assert token_weights([1, 4], "sequence") == [0.5, 0.125]


@every
def test_no_sequences_have_no_weights(aggregation):
    # An optimizer step in which no group can be trained on (`usable_rows`).
    assert weights([], aggregation) == []


@every
def test_names_and_documentation(aggregation):
    assert tuple(AGGREGATIONS) == get_args(Aggregation)
    assert AGGREGATIONS[aggregation].__name__ == aggregation
    text = inspect.getdoc(AGGREGATIONS[aggregation])
    order = [text.index(f"\n{label}: ") for label in ("Source", "Peers", "Use")]
    assert order == sorted(order)


@pytest.mark.parametrize("aggregation", ["sequence", "token"])
@PROPERTY
@given(values=lengths)
def test_the_tokens_of_a_step_weigh_one_together(aggregation, values):
    total = math.fsum(w for w, n in zip(token_weights(values, aggregation), values, strict=True) for _ in range(n))
    assert total == pytest.approx(1.0, rel=1e-12)


@PROPERTY
@given(lengths)
def test_sequences_or_tokens_weigh_the_same(values):
    by_sequence = token_weights(values, "sequence")
    assert [w * n for w, n in zip(by_sequence, values, strict=True)] == pytest.approx([1 / len(values)] * len(values))
    assert token_weights(values, "token") == pytest.approx([1 / math.fsum(values)] * len(values))


@every
@PROPERTY
@given(values=lengths, losses=st.lists(st.floats(-3, 3), min_size=30, max_size=30))
def test_weighted_sums_are_the_named_means(aggregation, values, losses):
    # Loss of a token: that of its sequence plus its position, so that sequences are not constant.
    tokens = [[loss + t / 100 for t in range(n)] for n, loss in zip(values, losses, strict=False)]
    assert weighted(weights(values, aggregation), tokens) == pytest.approx(ORACLES[aggregation](tokens), abs=1e-8)


@every
@PROPERTY
@given(values=lengths, random=st.randoms(use_true_random=False))
def test_order_does_not_matter(aggregation, values, random):
    order = list(range(len(values)))
    random.shuffle(order)
    before = weights(values, aggregation)
    assert weights([values[i] for i in order], aggregation) == [before[i] for i in order]


@every
@PROPERTY
@given(size=st.integers(1, MAX_LENGTH), count=st.integers(1, 20))
def test_equal_lengths_differ_by_a_factor_alone(aggregation, size, count):
    factor = {"sequence": 1, "token": 1, "constant": size / MAX_LENGTH, "sequence_sum": size}[aggregation]
    assert weights([size] * count, aggregation) == pytest.approx([factor / (count * size)] * count)


@every
def test_wrong_input_is_named(aggregation):
    with pytest.raises(ValueError, match="expected lengths >= 1, but got 0"):
        weights([3, 0], aggregation)
    with pytest.raises(ValueError, match="expected lengths >= 1, but got -2"):
        weights([-2, 3], aggregation)


@pytest.mark.parametrize("values", [[], [1]])
def test_an_unknown_aggregation_is_named(values):
    message = "unknown aggregation 'mean'; choose 'sequence', 'token', 'constant' or 'sequence_sum'"
    with pytest.raises(ValueError, match=message):
        token_weights(values, "mean")


@pytest.mark.parametrize("values", [[], [1]])
@pytest.mark.parametrize("bad", [None, 0, -3])
def test_the_constant_must_be_given(values, bad):
    with pytest.raises(ValueError, match=f"expected max_length >= 1, which .* 'constant' divides by, but got {bad}"):
        token_weights(values, "constant", max_length=bad)
