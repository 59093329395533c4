"""Where a run keeps its files."""

import itertools
from pathlib import Path
from weakref import WeakKeyDictionary

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger

FOLDER_LOGGERS = (CSVLogger, TensorBoardLogger)
"""Loggers that keep a run in a folder of their own, in which it can go on."""

_WITHOUT_LOGGER = "grpo_lightning_runs"

_known: WeakKeyDictionary[Trainer, Path] = WeakKeyDictionary()


def run_directory(trainer: Trainer) -> Path:
    """The run's own folder, the same on all ranks.

    It is that of the first logger, in which `ModelCheckpoint` puts its ``checkpoints`` too: ``log_dir`` of CSV and
    TensorBoard, ``save_dir/name/version`` of others (W&B: project and run id; MLflow: experiment and run id). Without
    a logger it is ``grpo_lightning_runs/version_N`` in the Trainer's root directory, and the checkpoints are beside
    ``grpo_lightning_runs``.

    Args:
        trainer: The Trainer, from its ``setup`` hooks on. All ranks must take part in the first call.
    """
    if trainer not in _known:
        path = str(_resolve(trainer)) if trainer.is_global_zero else ""
        _known[trainer] = Path(trainer.strategy.broadcast(path))
    return _known[trainer]


def _resolve(trainer: Trainer) -> Path:
    root = Path(trainer.default_root_dir)
    logger = trainer.logger
    if logger is None or isinstance(logger, DummyLogger):
        return _new_version(root / _WITHOUT_LOGGER)
    if isinstance(logger, FOLDER_LOGGERS):
        return Path(logger.log_dir)
    return _logger_directory(logger, root)


def _logger_directory(logger: Logger, root: Path) -> Path:
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(logger.save_dir or root, str(logger.name), version)


def _new_version(parent: Path) -> Path:
    for number in itertools.count():
        path = parent / f"version_{number}"
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path
    raise AssertionError


def new_file(folder: Path, name: str) -> Path:
    """A path in the folder, which is made, where no file is yet: ``name``, or ``stem-1.suffix`` and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    first = folder / name
    names = itertools.chain([first], (first.with_stem(f"{first.stem}-{n}") for n in itertools.count(1)))
    return next(path for path in names if not path.exists())
