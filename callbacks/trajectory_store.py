"""Everything that an epoch sampled, kept so that it can be looked at and replayed."""

from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from numpy.typing import NDArray
from torch.optim import Optimizer

from grpo_lightning.callbacks.run_directory import run_directory
from grpo_lightning.datamodule import RolloutDataModule
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.module import GRPOModule
from grpo_lightning.rollout.rollout import Rollout
from grpo_lightning.staging import discard
from grpo_lightning.trajectories.store import stored_epochs, write_epoch, write_log_ratios
from grpo_lightning.trajectories.stored import StoredEpoch


class TrajectoryStore(Callback):
    """Stores each epoch's trajectories as Parquet files in ``trajectories/`` in the run's folder.

    Tokens with their source and sample-time logprobs, messages, rewards and advantages are written before the epoch
    is trained on, so that they survive whatever comes; the log-ratios that the loss saw are added when it ends.
    ``grpo_lightning.trajectories.store.load_epoch`` reads them, ``grpo-lightning replay`` computes with them again.

    Args:
        every_n_epochs: Store the epochs 0, n, 2n and so on.
        keep: How many stored epochs to keep, the latest; all by default.
    """

    def __init__(self, every_n_epochs: int = 1, keep: int | None = None) -> None:
        if every_n_epochs < 1 or (keep is not None and keep < 1):
            raise ConfigurationError(f"expected every_n_epochs and keep >= 1, but got {every_n_epochs} and {keep}")
        self._every = every_n_epochs
        self._keep = keep
        self._written: Rollout | None = None
        self._log_ratios: NDArray[np.float64] | None = None
        self._restored: torch.Tensor | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have all ranks agree on the run's folder."""
        if stage == "fit":
            run_directory(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the rollout of an epoch that goes on in its middle, where Lightning calls no other hook."""
        self._write(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the epoch's rollout before training on it."""
        self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        rollout = self._rollout(trainer)
        if rollout is None or rollout is self._written:
            return
        folder = run_directory(trainer)
        batch = rollout.batches[0]
        write_epoch(
            folder,
            StoredEpoch(rollout.origin, rollout.layout, batch.temperature, batch.banned_token_ids, rollout.groups),
        )
        if self._keep is not None:
            for path in list(stored_epochs(folder).values())[: -self._keep]:
                discard(path)
        restored, self._restored = self._restored, None
        self._log_ratios = np.full(len(rollout.stored), np.nan) if restored is None else restored.numpy().copy()
        self._written = rollout

    def _rollout(self, trainer: Trainer) -> Rollout | None:
        """The rollout that is trained on, in the first process, if it is to be stored."""
        data = getattr(trainer, "datamodule", None)
        if not trainer.is_global_zero or not isinstance(data, RolloutDataModule) or data.rollout is None:
            return None
        return None if data.rollout.origin.epoch % self._every else data.rollout

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Note the log-ratios of this update; all ranks give theirs."""
        assert isinstance(pl_module, GRPOModule)
        evidence = pl_module.current_update().evidence
        if self._log_ratios is not None:
            self._log_ratios[evidence.ledger_index.numpy()] = evidence.log_ratio.numpy()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the log-ratios to what is stored."""
        log_ratios, self._log_ratios = self._log_ratios, None
        if log_ratios is not None and self._written is not None:
            write_log_ratios(stored_epochs(run_directory(trainer))[self._written.origin.epoch], log_ratios)

    def state_dict(self) -> dict[str, Any]:
        """The log-ratios of an epoch in its middle."""
        return {"log_ratios": None if self._log_ratios is None else torch.from_numpy(self._log_ratios.copy())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there when the epoch's rollout is written again."""
        self._restored = state_dict["log_ratios"]
