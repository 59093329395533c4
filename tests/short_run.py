"""A short run without a real engine, for tests of what a run leaves behind."""

from typing import Any

from fakes import FakeEngine
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger

from grpo_lightning import GRPOModule, RolloutDataModule
from grpo_lightning.callbacks import RatioDegeneracyDetector
from grpo_lightning.tasks import SumTasks


def length(completion: str) -> float:
    return float(len(completion))


def short_run(
    model: str,
    folder: Any,
    logger: Any,
    *,
    module: GRPOModule | None = None,
    callbacks: Any = (),
    updates: int = 1,
    **settings: Any,
) -> Trainer:
    """Fit the tiny model for one epoch of one update (unless told otherwise) and return the Trainer."""
    defaults = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "default_root_dir": folder,
    }
    # The fake engine's logprobs are random numbers.
    detector = RatioDegeneracyDetector(max_mismatch=100)
    trainer = Trainer(logger=logger, callbacks=[*callbacks, detector], **{**defaults, **settings})
    data = RolloutDataModule(
        SumTasks(5),
        [length, lambda completion: float(len(set(completion)))],
        engine=FakeEngine(),
        prompts_per_rollout=4,
        samples_per_prompt=3,
        updates_per_rollout=updates,
        max_tokens=6,
        max_prompt_tokens=64,
        val_size=3,
    )
    trainer.fit(module or GRPOModule(model, dtype="float32", lora_rank=4, learning_rate=1e-3), data)
    return trainer


class EngineWithSettings(FakeEngine):
    """An engine with settings of the kind that hold secrets."""

    def __init__(self, engine_args: dict[str, Any] | None = None, env: dict[str, str] | None = None) -> None:
        super().__init__()


class LoggerWithKey(CSVLogger):
    """A logger that takes a key."""

    def __init__(self, save_dir: str, api_key: str) -> None:
        super().__init__(save_dir)
