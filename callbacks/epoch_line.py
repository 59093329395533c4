"""One line an epoch."""

import time
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from tqdm import tqdm

from grpo_lightning.module import GRPOModule


class EpochLine(Callback):
    """Prints what a person wants to know of an epoch, on one line, also where bars are off."""

    def __init__(self) -> None:
        self._begin = 0.0
        self._first_epoch = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of the time left."""
        self._begin = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note where a resumed run starts."""
        self._first_epoch = trainer.current_epoch

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the line."""
        assert isinstance(pl_module, GRPOModule)
        if not trainer.is_global_zero:
            return
        done = trainer.current_epoch + 1 - self._first_epoch
        seconds = (time.monotonic() - self._begin) / done
        metrics = {**trainer.callback_metrics, **pl_module.epoch_metrics()}
        tqdm.write(epoch_line(metrics, trainer.current_epoch + 1, trainer.max_epochs, seconds))


def epoch_line(metrics: Mapping[str, Any], epoch: int, planned: int | None, seconds_per_epoch: float) -> str:
    """The line of one epoch.

    Args:
        metrics: Logged metrics.
        epoch: Epochs done.
        planned: Epochs planned; None or -1 without a limit.
        seconds_per_epoch: Mean duration so far.
    """

    def get(name: str) -> float:
        return float(metrics.get(name, float("nan")))

    limited = planned is not None and planned > 0
    parts = [
        f"epoch {epoch}/{planned}" if limited else f"epoch {epoch}",
        f"reward {get('reward/mean'):.3f}",
        f"ratio {get('ppo/ratio_mean'):.4f} ± {get('ppo/ratio_std'):.2g} (k ≤ {get('ppo/updates_since_sampling'):.0f})",
        f"length {get('completion/length_mean'):.1f} ({get('completion/truncated_fraction'):.0%} cut)",
        f"rollout {get('time/rollout_seconds'):.1f} s, {get('throughput/rollout_tokens_per_second'):.0f} tok/s",
        f"train {get('time/train_seconds'):.1f} s, {get('throughput/train_tokens_per_second'):.0f} tok/s",
    ]
    if "val/accuracy" in metrics:
        parts.insert(2, f"held-out accuracy {get('val/accuracy'):.3f}")
    if limited:
        assert planned is not None
        minutes, seconds = divmod(round(max(0, planned - epoch) * seconds_per_epoch), 60)
        parts.append(f"{minutes}:{seconds:02d} left")
    return " | ".join(parts)
