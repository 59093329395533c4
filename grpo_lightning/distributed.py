"""What several training processes tell each other: Python objects, over the CPU."""

import datetime
import pickle
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypeVar, cast

import torch.distributed as dist

from grpo_lightning.errors import RolloutError

T = TypeVar("T")

_PATIENCE = datetime.timedelta(days=7)


class Processes:
    """The processes of one run. With a single process every exchange is the identity.

    Exchanges go through a process group of their own (gloo), because processes wait in them while the first one
    makes a rollout: the main group's time-out, 10 to 30 minutes, is meant for gradients.
    """

    def __init__(self) -> None:
        self.count = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self.rank = dist.get_rank() if self.count > 1 else 0
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE) if self.count > 1 else None

    @property
    def first(self) -> bool:
        """Whether this is the process that owns the engine."""
        return self.rank == 0

    def gather(self, item: T) -> list[T]:
        """Every process's item, by rank, in every process. All must call it."""
        if self.count == 1:
            return [item]
        items: list[Any] = [None] * self.count
        dist.all_gather_object(items, item, group=self._group)
        return items

    def scatter_from_first(self, make: Callable[[], Sequence[T]]) -> T:
        """Let the first process make one item for each process. All must call it.

        Args:
            make: Called in the first process alone.

        Raises:
            RolloutError: In the other processes, if ``make`` raised in the first, where its own error is raised.
        """
        if self.count == 1:
            return make()[0]
        mine: list[T] = []
        messages: list[Any] | None = None
        failure: Exception | None = None
        if self.first:
            try:
                items = make()
                mine = [items[0]]
                # Its own item need not be sent; whether the others can be is found where all can be told.
                messages = [None, *(pickle.dumps((item, None)) for item in items[1:])]
            except Exception as error:
                failure = error
                messages = [pickle.dumps((None, f"{type(error).__name__}: {error}"))] * self.count
        received: list[Any] = [None]
        dist.scatter_object_list(received, messages, src=0, group=self._group)
        if failure is not None:
            raise failure
        if self.first:
            return mine[0]
        item, message = pickle.loads(received[0])
        if message is not None:
            raise RolloutError(f"the first process failed: {message}")
        return cast(T, item)

    def from_first(self, make: Callable[[], T]) -> T:
        """Let the first process make one item for all. All must call it; errors as in `scatter_from_first`."""

        def copies() -> list[T]:
            return [make()] * self.count

        return self.scatter_from_first(copies)


def processes() -> Processes:
    """The processes of this run. The first call after they were launched must be made by all of them."""
    distributed = dist.is_available() and dist.is_initialized()
    return _processes(dist.group.WORLD if distributed else None)


@lru_cache(maxsize=1)
def _processes(world: object) -> Processes:
    return Processes()
