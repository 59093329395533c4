"""Where a run keeps its files."""

from pathlib import Path

from lightning.pytorch import Trainer


def run_directory(trainer: Trainer) -> Path:
    """The first logger's directory, or the Trainer's root directory without a logger."""
    return Path(trainer.log_dir or trainer.default_root_dir)
