"""Loaders of batches that are ready."""

from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")


class BatchLoader(Generic[T]):
    """Batches in order, from a position on.

    Not a `torch.utils.data.DataLoader`: Lightning must not give it a distributed sampler (each process has its own
    batches), and a DataLoader draws from the global random generator.

    Args:
        batches: All batches.
        start: How many of them were consumed before the run was interrupted.
    """

    def __init__(self, batches: Sequence[T], start: int = 0) -> None:
        self.batches = tuple(batches)
        self._start = start

    def __len__(self) -> int:
        """All batches; Lightning counts those that it had before."""
        return len(self.batches)

    def __iter__(self) -> Iterator[T]:
        return iter(self.batches[self._start :])

    def state_dict(self) -> dict[str, int]:
        """Tells Lightning that this loader resumes; the position is kept by the data module, with the rollout."""
        return {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Nothing to restore."""
