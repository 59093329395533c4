"""The order in which tasks are drawn: pure functions ``(position, size, seed) -> index``, so that none needs state."""

import random
from collections.abc import Callable
from functools import lru_cache

from grpo_lightning.errors import ConfigurationError

Order = Callable[[int, int, int], int]
"""From tasks drawn before this one, tasks there are, and the seed of the run, to the index of a task."""


def shuffled(position: int, size: int, seed: int) -> int:
    """A new permutation of all tasks in every pass.

    Args:
        position: Tasks drawn before this one.
        size: Length of the source.
        seed: Seed of the run.
    """
    return _permutation(position // size, size, seed)[position % size]


def sequential(position: int, size: int, seed: int) -> int:
    """The order of the source, again and again: a curriculum, if the source is sorted.

    Args:
        position: Tasks drawn before this one.
        size: Length of the source.
        seed: Not used.
    """
    return position % size


class Widening:
    """A curriculum for a source sorted from easy to hard: drawn at random from its beginning, ever more of it.

    The part that is drawn from grows linearly. When it holds all tasks, the order goes on as `shuffled`.

    Args:
        start: Share of the tasks to begin with, above 0 and at most 1.
        positions: Tasks drawn until the part holds all of them.
    """

    def __init__(self, start: float = 0.1, positions: int = 1000) -> None:
        if not 0 < start <= 1:
            raise ConfigurationError(f"expected start to be a share above 0 and at most 1, but got {start}")
        if positions < 1:
            raise ConfigurationError(f"expected positions >= 1, but got {positions}")
        self._start = start
        self._positions = positions

    def __call__(self, position: int, size: int, seed: int) -> int:
        """Index of the task at a position; arguments as of `shuffled`."""
        if position >= self._positions:
            return shuffled(position, size, seed)
        share = self._start + (1 - self._start) * position / self._positions
        return random.Random(f"widening {seed} {position}").randrange(max(1, round(share * size)))


def draw(order: Order, position: int, size: int, seed: int) -> int:
    """What an order says, checked.

    Raises:
        ConfigurationError: If the index is outside the source.
    """
    index = order(position, size, seed)
    if index not in range(size):
        name = getattr(order, "__name__", type(order).__name__)
        raise ConfigurationError(
            f"expected the order {name} to return the index of one of {size} tasks (0 to {size - 1}), but got "
            f"{index!r} at position {position}"
        )
    return index


@lru_cache(maxsize=4)
def _permutation(epoch: int, size: int, seed: int) -> tuple[int, ...]:
    order = list(range(size))
    random.Random(f"order {seed} {epoch}").shuffle(order)
    return tuple(order)
