"""Metrics in torchmetrics' form, and the numbers of an epoch."""

from grpo_lightning.metrics.epoch import EpochStatistics
from grpo_lightning.metrics.ratio import RatioStats

__all__ = ["EpochStatistics", "RatioStats"]
