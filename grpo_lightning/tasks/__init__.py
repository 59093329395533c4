"""Task sources: sequences of `Task`, from an index to a task, so that resuming takes one integer."""

from grpo_lightning.tasks.datasets import DatasetTasks
from grpo_lightning.tasks.jsonl import JsonlTasks
from grpo_lightning.tasks.order import Order, Widening, sequential, shuffled
from grpo_lightning.tasks.parquet import ParquetTasks
from grpo_lightning.tasks.reasoning_gym import ReasoningGymTasks
from grpo_lightning.tasks.seeds import SeedTasks
from grpo_lightning.tasks.source import Subset, TaskSource, hold_out
from grpo_lightning.tasks.sums import SumTasks

__all__ = [
    "DatasetTasks",
    "JsonlTasks",
    "Order",
    "ParquetTasks",
    "ReasoningGymTasks",
    "SeedTasks",
    "Subset",
    "SumTasks",
    "TaskSource",
    "Widening",
    "hold_out",
    "sequential",
    "shuffled",
]
