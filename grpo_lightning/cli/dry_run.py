"""``fit --dry-run``: what a run would do, without loading a model."""

from datetime import datetime
from pathlib import Path

from lightning.pytorch import Trainer

from grpo_lightning.datamodule import RolloutDataModule
from grpo_lightning.module import GRPOModule


def default_folder() -> Path:
    """A new folder for the resolved settings."""
    return Path("runs") / f"dry-run-{datetime.now():%Y%m%d-%H%M%S}"


def describe(module: GRPOModule, data: RolloutDataModule, trainer: Trainer, folder: Path | None) -> str:
    """Check rewards, tokenizer and the first prompt, and say what the run would be.

    Args:
        module: The module.
        data: Its data module.
        trainer: The Trainer.
        folder: Where the run will keep its files; None if its logger decides that later.

    Raises:
        ConfigurationError: If the run could not work.
    """
    data.scorer.check(data.tasks[0])
    prompt = data.prompt_encoder(module.model_name)(data.tasks[0])
    held_out = len(data.val_tasks) if data.val_tasks is not None else 0
    return "\n".join(
        [
            f"Model:    {module.model_name}",
            f"Tasks:    {len(data.tasks)}, {held_out} held out; the first prompt has {len(prompt)} tokens",
            f"Rewards:  {', '.join(data.scorer.names)}",
            f"Engine:   {type(data.engine).__name__}",
            f"Batches:  {data.plan(trainer)}",
            f"Run in:   {folder or 'a new folder of its logger'}",
        ]
    )
