import pytest
import torch

from grpo_lightning.callbacks.epoch_line import epoch_line

METRICS = {
    "reward/mean": 0.51249,
    "ppo/ratio_mean": torch.tensor(1.00014),
    "ppo/ratio_std": 0.01234,
    "ppo/updates_since_sampling": 3.0,
    "completion/length_mean": 21.26,
    "completion/truncated_fraction": 0.125,
    "time/rollout_seconds": 4.56,
    "throughput/rollout_tokens_per_second": 1234.5,
    "time/train_seconds": 7.89,
    "throughput/train_tokens_per_second": 99.6,
}


def test_the_whole_line():
    assert epoch_line(METRICS, 3, 10, 9.5) == (
        "epoch 3/10 | reward 0.512 | ratio 1.0001 ± 0.012 (k ≤ 3) | length 21.3 (12% cut) | "
        "rollout 4.6 s, 1234 tok/s | train 7.9 s, 100 tok/s | 1:06 left"
    )


def test_accuracy_stands_behind_the_reward_where_there_is_one():
    parts = epoch_line(METRICS | {"val/accuracy": torch.tensor(0.75)}, 3, 10, 1).split(" | ")
    assert parts[1:3] == ["reward 0.512", "held-out accuracy 0.750"]
    assert "accuracy" not in epoch_line(METRICS, 3, 10, 1)


@pytest.mark.parametrize("planned", [None, -1])
def test_without_limit_there_is_no_time_left(planned):
    line = epoch_line(METRICS, 3, planned, 9.5)
    assert line.startswith("epoch 3 | ")
    assert "left" not in line
    assert line.endswith("tok/s")


@pytest.mark.parametrize(
    ("epoch", "planned", "seconds", "left"),
    [
        (10, 10, 60.0, "0:00"),
        (9, 10, 5.4, "0:05"),
        (9, 10, 59.6, "1:00"),
        (1, 10, 60.0, "9:00"),
        (0, 100, 61.0, "101:40"),
        (12, 10, 60.0, "0:00"),
    ],
)
def test_time_left(epoch, planned, seconds, left):
    assert epoch_line(METRICS, epoch, planned, seconds).endswith(f" | {left} left")


@pytest.mark.parametrize("name", sorted(METRICS))
def test_a_missing_metric_is_told_as_nan(name):
    metrics = {n: v for n, v in METRICS.items() if n != name}
    assert "nan" in epoch_line(metrics, 1, 2, 1.0)
    assert "nan" not in epoch_line(METRICS, 1, 2, 1.0)


def test_it_is_one_line():
    assert "\n" not in epoch_line({}, 1, 2, 1.0)
