"""What the sections of training and rollouts make of their measurements."""

import pytest
import torch

from benchmarks.performance import batches, paths, rollouts, training
from benchmarks.performance.batches import Shape, made_batch
from grpo_lightning import GRPOModule, attention
from grpo_lightning.functional import logprobs

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


PATHS = {
    "steps": {"a": {"with": [1.0, 2.0], "without": [2.0, 3.0]}},
    "rollouts": {"b": {"with": [4.0, 4.0], "without": [8.0, 4.8]}},
    "shapes": {"step": vars(Shape(1, 2, 3, 4)), "rollout": vars(Shape(5, 6, 7, 8))},
}


def test_the_path_that_gains_least_is_told():
    assert paths.headline(PATHS) == {"paths_least_gain": pytest.approx(1.6)}
    table = paths.table(PATHS)
    assert "| training step: a | 1.50 (1.00 to 2.00) | 2.50 (2.00 to 3.00) | 1.75 (1.50 to 2.00) |" in table
    assert table.splitlines()[-1] == (
        "The step has 1 prompts of 3 tokens, 2 samples of 4; the rollout 5 prompts of 7 tokens, 6 samples of 8, "
        "each in a fresh engine."
    )


def test_every_path_is_taken_away_and_back_and_computes_the_same(tiny_model, monkeypatch):
    module = GRPOModule(tiny_model, dtype="float32", lora_rank=4)
    module.configure_model()
    monkeypatch.setattr(batches, "_FIRST_ORDINARY", 5)
    monkeypatch.setattr(batches, "VOCABULARY", module.policy.causal_lm.config.vocab_size)
    batch = made_batch(Shape(1, 2, 5, 4))

    def state():
        layers = [type(layer).__name__ for layer in module.modules() if "LoRALinear" in type(layer).__name__]
        return len(layers), attention.attention_dtype(torch.bfloat16, "cpu"), logprobs.BLOCK_BYTES

    def gradients():
        loss, _ = module.batch_loss(batch)
        return torch.autograd.grad(loss, list(module.policy.trainable_parameters().values()))

    kept, whole = state(), gradients()
    for name, off in paths.TRAINING.items():
        with off(module):
            assert state() != kept, name
            torch.testing.assert_close(gradients(), whole, rtol=1e-4, atol=1e-6)
        assert state() == kept
