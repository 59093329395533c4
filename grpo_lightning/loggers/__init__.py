"""What Lightning's loggers lack: one for Trackio, and tables for all of them."""

from grpo_lightning.loggers.tables import Table, TableWriter
from grpo_lightning.loggers.trackio import TrackioLogger

__all__ = ["Table", "TableWriter", "TrackioLogger"]
