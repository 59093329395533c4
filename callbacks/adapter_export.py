"""The adapter as a folder that other tools load."""

import shutil
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from grpo_lightning.adapters import save_adapter
from grpo_lightning.callbacks.run_directory import run_directory
from grpo_lightning.module import GRPOModule


class AdapterExport(Callback):
    """Saves the adapter in PEFT's format at the end of every epoch: ``adapters/epoch-0003`` in the run's folder.

    transformers, PEFT and vLLM load such a folder as it is.

    Args:
        keep: How many to keep, from the latest back; all if 0.
    """

    def __init__(self, keep: int = 1) -> None:
        self._keep = keep

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, then delete what is too old."""
        assert isinstance(pl_module, GRPOModule)
        if not trainer.is_global_zero:
            return
        path = adapter_path(trainer, trainer.current_epoch)
        shutil.rmtree(path, ignore_errors=True)
        save_adapter(pl_module.policy, path)
        if self._keep:
            for old in sorted(path.parent.glob("epoch-*"))[: -self._keep]:
                shutil.rmtree(old)


def adapter_path(trainer: Trainer, epoch: int) -> Path:
    """Folder of an epoch's adapter."""
    return run_directory(trainer) / "adapters" / f"epoch-{epoch:04d}"
