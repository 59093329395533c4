"""The adapter as a folder that other tools load."""

import shutil
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from grpo_lightning.adapters import save_adapter
from grpo_lightning.callbacks.run_directory import run_directory
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.module import GRPOModule


class AdapterExport(Callback):
    """Saves the adapter in PEFT's format at the end of every epoch: ``adapters/epoch-0003`` in the run's folder.

    transformers, PEFT and vLLM load such a folder as it is.

    Args:
        keep: How many to keep, from the latest back; all if 0.
    """

    def __init__(self, keep: int = 1) -> None:
        self._keep = keep
        self._saved: list[Path] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start a new run's list; what earlier runs saved is theirs. Have all ranks agree on the run's folder.

        Raises:
            ConfigurationError: If there is no adapter to save.
        """
        if pl_module.hparams.get("full_finetuning"):
            raise ConfigurationError(
                "expected an adapter to export, but full_finetuning trains none; remove AdapterExport and export the "
                "model from a checkpoint (grpo_lightning.export)"
            )
        self._saved = []
        if stage == "fit":
            run_directory(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, then delete what is too old."""
        assert isinstance(pl_module, GRPOModule)
        if not trainer.is_global_zero:
            return
        path = run_directory(trainer) / "adapters" / f"epoch-{trainer.current_epoch:04d}"
        shutil.rmtree(path, ignore_errors=True)
        save_adapter(pl_module.policy, path)
        self._saved.append(path)
        while self._keep and len(self._saved) > self._keep:
            shutil.rmtree(self._saved.pop(0), ignore_errors=True)

    @property
    def latest(self) -> Path | None:
        """The folder saved last in this run."""
        return self._saved[-1] if self._saved else None
