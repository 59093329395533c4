"""Batches of tasks, for validation and prediction: they are answered in the step, when the policy is current."""

from typing import Self

import torch

from grpo_lightning.rollout.loader import BatchLoader
from grpo_lightning.rollout.types import Task
from grpo_lightning.tasks import TaskSource


class TaskBatch:
    """Tasks of one validation or prediction step.

    Args:
        tasks: The tasks.
    """

    # Not a dataclass, as `PackedBatch` is none.
    def __init__(self, tasks: tuple[Task, ...]) -> None:
        self.tasks = tasks

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Itself: tasks hold no tensors."""
        return self


def task_loader(source: TaskSource, size: int) -> BatchLoader[TaskBatch]:
    """All tasks of a source in order, ``size`` at a time."""
    tasks = [source[index] for index in range(len(source))]
    return BatchLoader([TaskBatch(tuple(tasks[i : i + size])) for i in range(0, len(tasks), size)])
