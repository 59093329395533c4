import math
import statistics

import pytest
from fakes import make_group, make_sample

from grpo_lightning.rollout.metrics import rollout_metrics


@pytest.fixture
def groups():
    return [
        make_group(
            [1],
            [
                make_sample([1, 2, 3], 1.0, rewards={"exact": 1.0, "style": None}),
                make_sample([1], 0.0, rewards={"exact": 0.0, "style": 0.5}),
                make_sample([1, 2], 0.5, rewards={"exact": 0.5, "style": 0.25}, finish_reason="length"),
            ],
        ),
        make_group([2], [make_sample([5] * 7, 2.0, rewards={"exact": 2.0}) for _ in range(3)]),
        make_group(
            [3],
            [
                make_sample([4], None, rewards={"exact": 3.0}),
                make_sample([4, 4], 1.0, rewards={"exact": 1.0}, forced=True),
                make_sample([4], None, rewards={}, finish_reason="length"),
            ],
        ),
    ]


def test_every_number(groups):
    rewards = [1.0, 0.0, 0.5, 2.0, 2.0, 2.0, 1.0]
    lengths = [3, 1, 2, 7, 7, 7, 1, 2, 1]
    assert rollout_metrics(groups) == pytest.approx(
        {
            "reward/mean": statistics.fmean(rewards),
            "reward/std": statistics.pstdev(rewards),
            "reward/failed": 2,
            # Two groups have something to compare; one of them has equal rewards.
            "group/zero_variance_fraction": 1 / 2,
            "group/dropped": 1,
            "completion/length_mean": statistics.fmean(lengths),
            "completion/length_max": 7,
            "completion/truncated_fraction": 2 / 9,
            "tokens/sampled": sum(lengths),
            "tokens/forced": 2,
            "reward/exact": statistics.fmean([1.0, 0.0, 0.5, 2.0, 2.0, 2.0, 3.0, 1.0]),
            "reward/style": 0.375,
        }
    )


def test_all_values_are_plain_floats(groups):
    assert {type(v) for v in rollout_metrics(groups).values()} == {float}


def test_a_reward_that_never_applies_has_no_mean():
    samples = [make_sample([1], 1.0, rewards={"a": 1.0, "b": None}) for _ in range(2)]
    metrics = rollout_metrics([make_group([1], samples)])
    assert metrics["reward/a"] == 1.0
    assert "reward/b" not in metrics


def test_nothing_scored_is_nan_and_not_an_error():
    metrics = rollout_metrics([make_group([1], [make_sample([1], None), make_sample([1], None)])])
    assert math.isnan(metrics["reward/mean"])
    assert metrics["reward/failed"] == 2
    assert metrics["group/dropped"] == 1
    assert metrics["group/zero_variance_fraction"] == 0
