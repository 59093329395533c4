"""Which tasks a rollout is made of."""

import pytest
from fakes import FakeEngine
from lightning.pytorch import Trainer

from grpo_lightning import GRPOModule, RolloutDataModule
from grpo_lightning.callbacks import RatioDegeneracyDetector
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.tasks import SumTasks, sequential


def even(completion):
    return float(len(completion) % 2 == 0)


def run(tmp_path, model, engine, *, epochs=2, reward=even, **settings):
    defaults = {"prompts_per_rollout": 4, "samples_per_prompt": 2, "max_tokens": 6, "max_prompt_tokens": 64}
    data = RolloutDataModule(SumTasks(5), reward, engine=engine, **{**defaults, **settings})
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        # The fake engine's logprobs are random numbers.
        callbacks=[RatioDegeneracyDetector(max_mismatch=100)],
    )
    trainer.fit(GRPOModule(model, dtype="float32", lora_rank=4), data)
    return trainer, data


class TestOrder:
    def test_rollouts_follow_the_order(self, tmp_path, tiny_model):
        seen = []

        def note(completion, task_id):
            seen.append(task_id)
            return even(completion)

        run(tmp_path, tiny_model, FakeEngine(), reward=note, order=sequential)
        assert sorted(seen[:8]) == sorted(["0+0", "0+1", "0+2", "0+3"] * 2)
        assert sorted(seen[8:]) == sorted(["0+4", "0+5", "1+0", "1+1"] * 2)

    def test_the_order_gets_position_size_and_seed(self, tmp_path, tiny_model):
        asked = []

        def order(position, size, seed):
            asked.append((position, size, seed))
            return 0

        run(tmp_path, tiny_model, FakeEngine(), order=order, seed=5, val_size=6)
        assert asked[-8:] == [(position, 30, 5) for position in range(8)]

    def test_a_wrong_order_is_refused_before_the_engine_starts(self, tmp_path, tiny_model):
        def one_based(position, size, seed):
            return size - position % size

        engine = FakeEngine()
        with pytest.raises(
            ConfigurationError, match="the order one_based .* of one of 36 tasks .* got 36 at position 0"
        ):
            run(tmp_path, tiny_model, engine, order=one_based)
        assert not engine.specs
