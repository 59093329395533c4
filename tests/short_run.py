"""A short run without a real engine, for tests of what a run leaves behind."""

from typing import Any

from fakes import FakeEngine
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from runs import MODEL, data, length, trainer

from grpo_lightning import GRPOModule


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
    defaults = {"max_epochs": 1, "log_every_n_steps": 1}
    run = trainer(folder, logger=logger, callbacks=list(callbacks), **{**defaults, **settings})
    rewards = [length, lambda completion: float(len(set(completion)))]
    run.fit(
        module or GRPOModule(model, **MODEL),
        data(FakeEngine(), rewards=rewards, updates_per_rollout=updates, val_size=3),
    )
    return run


class EngineWithSettings(FakeEngine):
    """An engine with settings of the kind that hold secrets."""

    def __init__(self, engine_args: dict[str, Any] | None = None, env: dict[str, str] | None = None) -> None:
        super().__init__()


class LoggerWithKey(CSVLogger):
    """A logger that takes a key."""

    def __init__(self, save_dir: str, api_key: str) -> None:
        super().__init__(save_dir)
