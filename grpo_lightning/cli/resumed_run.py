"""Having a Trainer go on in the folder of an earlier run."""

import shlex
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from grpo_lightning.callbacks.run_directory import FOLDER_LOGGERS
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.runs import Progress, checkpoint_progress, drop_later_records, find_run


def go_on_in(trainer: Trainer, folder: Path) -> None:
    """Have a Trainer's loggers and callbacks go on in a run's folder, wherever that has been moved to.

    Nothing in the folder is changed before training goes on.

    Args:
        trainer: The Trainer, before it is used.
        folder: The run's folder, as an absolute path.

    Raises:
        ConfigurationError: If its first logger, which decides on the run's folder, cannot go on in one.
    """
    if not isinstance(trainer.logger, FOLDER_LOGGERS):
        got = "none" if trainer.logger is None else type(trainer.logger).__name__
        config, checkpoint = find_run(folder)
        command = shlex.join(["grpo-lightning", "fit", "-c", str(config), "--ckpt_path", str(checkpoint)])
        raise ConfigurationError(
            f"expected CSVLogger or TensorBoardLogger as the run's first logger, but got {got}: only these can go on "
            f"in a run's folder; go on in a new one: {command}"
        )
    for logger in trainer.loggers:
        if isinstance(logger, FOLDER_LOGGERS):
            _write_to(logger, folder)
        if isinstance(logger, CSVLogger) and trainer.is_global_zero:
            logger._experiment = _AppendingWriter(logger.log_dir)
    # The first of all, so that none has written anything when it cuts.
    trainer.callbacks.insert(0, _DropLaterRecords(folder))  # type: ignore[attr-defined]


def _write_to(logger: CSVLogger | TensorBoardLogger, folder: Path) -> None:
    # Where it was not moved the path stays as it was written: ModelCheckpoint compares it to know its own files.
    if Path(logger.root_dir).resolve() != folder.parent:
        logger._root_dir, logger._name = str(folder.parent.parent), folder.parent.name
        if isinstance(logger, CSVLogger):
            logger._save_dir = logger._root_dir
    logger._version = folder.name


class _AppendingWriter(ExperimentWriter):
    """Appends to a ``metrics.csv`` that is there already, which Lightning's writer would delete."""

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        path = Path(self.metrics_file_path)
        if path.is_file():
            with path.open(encoding="utf-8") as file:
                self.metrics_keys = file.readline().strip().split(",")

    def _check_log_dir_exists(self) -> None:
        pass


class _DropLaterRecords(Callback):
    """Takes what came after the checkpoint out of the run's records, once nothing can stop the run from going on."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._progress: Progress | None = None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note how far the checkpoint has come."""
        self._progress = checkpoint_progress(checkpoint)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Cut: the engine is up by now, and the first rollout made."""
        if self._progress is not None and trainer.is_global_zero:
            drop_later_records(self._folder, self._progress)
