import pytest
import torch

from grpo_lightning.diagnostics import Status
from grpo_lightning.diagnostics.checks.counts import explain_factor
from grpo_lightning.diagnostics.checks.weights import check_some_weight, check_weights, expected_weights

EPISODE = torch.tensor([7, 7, 7, 2, 7, 2, 5])
"""Three episodes of 4, 2 and 1 tokens; the first in two sequences."""


def test_golden_numbers():
    by_sequence = torch.tensor([1 / 12] * 3 + [1 / 6, 1 / 12, 1 / 6, 1 / 3]).double()
    torch.testing.assert_close(expected_weights(EPISODE, "sequence"), by_sequence)
    torch.testing.assert_close(expected_weights(EPISODE, "token"), torch.full((7,), 1 / 7).double())


@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_passes_in_float32(aggregation):
    for seed in range(100):
        episode = torch.randint(0, 9, (200,), generator=torch.Generator().manual_seed(seed))
        weight = expected_weights(episode, aggregation).float().double()
        assert check_weights(weight, episode, aggregation, counts={}).status is Status.PASS


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (expected_weights(EPISODE, "sequence") * 3, "3 is the number of sequences"),
        (expected_weights(EPISODE, "sequence") * 0.4, "all are 0.4 times too large"),
        (expected_weights(EPISODE, "token"), "those of aggregation='token'"),
        (expected_weights(EPISODE, "sequence").index_fill(0, torch.tensor(0), 0.1), "differ from it by token"),
    ],
)
def test_wrong_weights(weight, words):
    verdict = check_weights(weight, EPISODE, "sequence", counts={"sequences": 3})
    assert verdict.cause == "wrong_count"
    assert words in verdict.message
    assert f"sum of the weights: {float(weight.sum()):.4g}" in str(verdict)


def test_nothing_to_train_on():
    assert check_some_weight(1, 2) is None
    assert check_some_weight(0, 0).status is Status.NO_POWER
    assert check_some_weight(0, None).status is Status.NO_POWER
    assert check_some_weight(0, 2).cause == "all_masked"


@pytest.mark.parametrize(
    ("factor", "said"),
    [
        (4.0, "4 is the number of fours: it was not divided by"),
        (0.25, "0.25 is 1 over the number of fours: it was divided by once too often"),
        (1.0, None),
        (4.01, None),
    ],
)
def test_factors(factor, said):
    assert explain_factor(factor, {"ones": 1, "none": 0, "fours": 4}) == said
