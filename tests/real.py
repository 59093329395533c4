"""The real stack for tests that share one engine: starting vLLM costs more than the runs do."""

from dataclasses import replace

from lightning.pytorch import Trainer

from grpo_lightning import GRPOModule, RolloutDataModule, VLLMEngine
from grpo_lightning.rewards import last_number_correct
from grpo_lightning.tasks import SumTasks

SETTINGS = {"prompts_per_rollout": 4, "samples_per_prompt": 4, "max_tokens": 12, "max_prompt_tokens": 64}


class SharedVLLMEngine(VLLMEngine):
    """A vLLM engine that outlives the runs that use it; between runs it forgets the adapter."""

    def close(self):
        self._current = None

    def really_close(self):
        super().close()


def one_is_longer(completion):
    """A reward that always varies within a group of sampled completions."""
    return float(len(completion)) / 10


def make_trainer(**settings):
    defaults = {
        "accelerator": "cpu",
        "max_epochs": 3,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(**{**defaults, **settings})


def fit(engine, model, *, trainer=None, module=None, reward=one_is_longer, ckpt_path=None, **data):
    """One short run; returns the trainer."""
    trainer = trainer or make_trainer()
    settings = {"dtype": "float32", "learning_rate": 2e-4, **(module or {})}
    trainer.fit(
        GRPOModule(model, **settings),
        RolloutDataModule(SumTasks(), reward, engine=engine, **{**SETTINGS, **data}),
        ckpt_path=ckpt_path,
    )
    return trainer


def zeroed(generation):
    return replace(generation, logprobs=(0.0,) * len(generation.logprobs))


__all__ = ["SETTINGS", "SharedVLLMEngine", "fit", "last_number_correct", "make_trainer", "zeroed"]
