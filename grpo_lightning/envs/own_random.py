"""One random generator per episode, for packages that draw from Python's global ``random``.

Seeding the global generator for every episode would reseed everything else in the process, and whatever another thread
draws in between would change the game. So the package's modules get a stand-in for the ``random`` module instead,
which draws from the generator of the episode that is running in the current thread or coroutine. That needs no lock
and no process of its own, and costs about a microsecond a draw.
"""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_running: ContextVar[random.Random | None] = ContextVar("grpo_lightning_own_random", default=None)


class _StandIn:
    """Looks like the ``random`` module; outside of episodes it is."""

    def __getattr__(self, name: str) -> Any:
        own = _running.get()
        return getattr(own if hasattr(own, name) else random, name)


_STAND_IN = _StandIn()


def isolate(package: str) -> None:
    """Give all modules of a package that have been imported so far the stand-in.

    It reaches modules that say ``import random``; ``from random import choice`` binds the global generator for good.
    """
    for name, module in list(sys.modules.items()):
        if f"{name}.".startswith(f"{package}.") and vars(module).get("random") is random:
            vars(module)["random"] = _STAND_IN


@contextmanager
def drawing_from(own: random.Random) -> Iterator[None]:
    """Within, isolated packages draw from this generator; seeding ``random`` there seeds it."""
    token = _running.set(own)
    try:
        yield
    finally:
        _running.reset(token)
