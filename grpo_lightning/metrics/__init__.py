"""Metrics in torchmetrics' form."""

from grpo_lightning.metrics.ratio import RatioStats

__all__ = ["RatioStats"]
