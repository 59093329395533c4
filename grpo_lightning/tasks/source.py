"""What a task source is and how it is split."""

import random
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from grpo_lightning.errors import ConfigurationError
from grpo_lightning.rollout.types import Task


@runtime_checkable
class TaskSource(Protocol):
    """Any finite collection of tasks with stable indices."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Task: ...


class Subset:
    """Some tasks of another source, in the given order.

    Args:
        source: The other source.
        indices: Which of its tasks.
    """

    def __init__(self, source: TaskSource, indices: Sequence[int]) -> None:
        self._source = source
        self._indices = tuple(indices)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Task:
        return self._source[self._indices[index]]


def hold_out(source: TaskSource, count: int, seed: int) -> tuple[Subset, Subset]:
    """Split a source into training tasks and ``count`` held-out tasks, drawn by ``seed``.

    Raises:
        ConfigurationError: If nothing would be left for training.
    """
    if not 0 <= count < len(source):
        raise ConfigurationError(
            f"expected fewer held-out tasks than the {len(source)} tasks of the source, but val_size is {count}"
        )
    order = list(range(len(source)))
    random.Random(f"hold-out {seed}").shuffle(order)
    return Subset(source, sorted(order[count:])), Subset(source, order[:count])
