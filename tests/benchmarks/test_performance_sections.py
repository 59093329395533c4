"""What the sections of training and rollouts make of their measurements."""

import pytest

from benchmarks.performance import rollouts, training

TRAINING = {
    "rate": "a product",
    "cases": {
        "short": {
            "shape": {},
            "input_tokens": 10,
            "sampled_tokens": 5,
            "useful_operations": 2e12,
            "matmul_tflops": [2.0, 9.0, 4.0, 9.0],
            "packed": [{"seconds": 2.0, "bytes": 2**20}, {"seconds": 1.0, "bytes": 2**20}],
            "padded": [{"seconds": 4.0, "bytes": 2**22}, {"seconds": 4.0, "bytes": 2**22}],
        }
    },
}


def test_training_is_held_against_the_rate_measured_before_each_packed_step():
    numbers = training.numbers(TRAINING["cases"]["short"])
    assert numbers["share"] == {"median": 0.5, "min": 0.5, "max": 0.5}
    assert numbers["speedup"] == {"median": 3.0, "min": 2.0, "max": 4.0}
    assert training.headline(TRAINING) == {"train_matmul_share": 0.5, "peak_memory_ratio": 0.25}
    assert "| short | 10 | 5 | 1.50 (1.00 to 2.00) |" in training.table(TRAINING)


ROLLOUTS = {
    "cases": {
        "short": {
            "tokens_per_second": {"ours": [95.0], "logprobs": [100.0], "lora": [105.0], "base": [120.0]},
            "prefilled": 0.25,
        },
        "long": {
            "tokens_per_second": {"ours": [90.0], "logprobs": [100.0], "lora": [105.0], "base": [110.0]},
            "prefilled": 0.5,
        },
    }
}


def test_rollouts_are_held_against_the_same_engine_and_the_worse_case_counts():
    assert rollouts.headline(ROLLOUTS) == {
        "rollout_efficiency": pytest.approx(0.9),
        "lora_efficiency": pytest.approx(105 / 120),
    }
    table = rollouts.table(ROLLOUTS)
    assert "| vLLM | 120 (120 to 120) | 110 (110 to 110) |" in table
    assert table.splitlines()[-1].endswith("| 0.25 | 0.50 |")
