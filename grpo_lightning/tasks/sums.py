"""Sums of two small numbers: the task of the demo."""

from grpo_lightning.errors import ConfigurationError
from grpo_lightning.rollout.types import Task


class SumTasks:
    """All sums ``a + b`` with ``0 <= a, b <= max_number``, each once.

    Args:
        max_number: Largest summand.
    """

    def __init__(self, max_number: int = 20) -> None:
        if max_number < 1:
            raise ConfigurationError(f"expected max_number >= 1, but got {max_number}")
        self._side = max_number + 1

    def __len__(self) -> int:
        return self._side**2

    def __getitem__(self, index: int) -> Task:
        if not 0 <= index < len(self):
            raise IndexError(index)
        a, b = divmod(index, self._side)
        return Task(
            id=f"{a}+{b}",
            messages=({"role": "user", "content": f"What is {a} + {b}?"},),
            data={"answer": str(a + b)},
        )
