import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_lightning.functional import token_weights

PROPERTY = settings(max_examples=80, deadline=None, derandomize=True, database=None)
lengths = st.lists(st.integers(1, 2000), min_size=1, max_size=30)
aggregations = st.sampled_from(["sequence", "token"])


def test_golden_numbers():
    # Three sequences, ten tokens.
    assert token_weights([2, 3, 5], "sequence") == pytest.approx([1 / 6, 1 / 9, 1 / 15], rel=1e-15)
    assert token_weights([2, 3, 5], "token") == [0.1, 0.1, 0.1]


def test_sequence_is_the_default():
    assert token_weights([1, 4]) == [0.5, 0.125]


@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_no_sequences_have_no_weights(aggregation):
    # An optimizer step in which no group can be trained on (`usable_rows`).
    assert token_weights([], aggregation) == []


@PROPERTY
@given(lengths, aggregations)
def test_the_tokens_of_a_step_weigh_one_together(values, aggregation):
    total = math.fsum(w for w, n in zip(token_weights(values, aggregation), values, strict=True) for _ in range(n))
    assert total == pytest.approx(1.0, rel=1e-12)


@PROPERTY
@given(lengths)
def test_sequences_or_tokens_weigh_the_same(values):
    by_sequence = token_weights(values, "sequence")
    assert [w * n for w, n in zip(by_sequence, values, strict=True)] == pytest.approx([1 / len(values)] * len(values))
    assert token_weights(values, "token") == pytest.approx([1 / math.fsum(values)] * len(values))


@PROPERTY
@given(lengths, st.lists(st.floats(-3, 3), min_size=30, max_size=30))
def test_weighted_sums_are_the_named_means(values, losses):
    # Loss of a token: that of its sequence plus its position, so that sequences are not constant.
    tokens = [[loss + t / 100 for t in range(n)] for n, loss in zip(values, losses, strict=False)]

    def weighted(weights):
        return math.fsum(w * x for w, line in zip(weights, tokens, strict=True) for x in line)

    mean_of_means = math.fsum(math.fsum(line) / len(line) for line in tokens) / len(tokens)
    flat = [x for line in tokens for x in line]
    assert weighted(token_weights(values, "sequence")) == pytest.approx(mean_of_means, abs=1e-9)
    assert weighted(token_weights(values, "token")) == pytest.approx(math.fsum(flat) / len(flat), abs=1e-9)


def test_wrong_input_is_named():
    for aggregation in ("sequence", "token"):
        with pytest.raises(ValueError, match="expected lengths >= 1, but got 0"):
            token_weights([3, 0], aggregation)
        with pytest.raises(ValueError, match="expected lengths >= 1, but got -2"):
            token_weights([-2, 3], aggregation)
    with pytest.raises(ValueError, match="unknown aggregation 'mean'; choose 'sequence' or 'token'"):
        token_weights([1], "mean")
