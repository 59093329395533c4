"""Task sources: sequences of `Task`, from an index to a task, so that resuming takes one integer."""

from grpo_lightning.tasks.jsonl import JsonlTasks
from grpo_lightning.tasks.reasoning_gym import ReasoningGymTasks
from grpo_lightning.tasks.source import Subset, TaskSource, hold_out, task_index
from grpo_lightning.tasks.sums import SumTasks

__all__ = ["JsonlTasks", "ReasoningGymTasks", "Subset", "SumTasks", "TaskSource", "hold_out", "task_index"]
