"""A rollout that is sampled on a thread of its own while the one before is trained on."""

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from grpo_lightning.errors import ConfigurationError, StaleRolloutError
from grpo_lightning.rollout.engine import RolloutEngine

T = TypeVar("T")
R = TypeVar("R")

_PATIENCE = 5.0
"""Seconds that what was cancelled may take to end; then the engine is closed under it."""


class Cancel:
    """Ends the coroutines that run within it, on whichever event loop, whichever thread asks."""

    def __init__(self) -> None:
        self._asked = False
        self._running: tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]] | None = None

    async def within(self, coroutine: Coroutine[Any, Any, R]) -> R:
        """Await a coroutine unless, or until, all is cancelled."""
        task = asyncio.current_task()
        assert task is not None
        self._running = asyncio.get_running_loop(), task
        try:
            # Asked for after the task was noted, so that no cancellation falls between.
            if self._asked:
                coroutine.close()
                raise asyncio.CancelledError
            return await coroutine
        finally:
            self._running = None

    def ask(self) -> None:
        """Cancel what runs and what would come."""
        self._asked = True
        running = self._running
        if running is not None:
            loop, task = running
            # Its loop is closed if the engine went first.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(task.cancel)


class Ahead(Generic[T]):
    """What is being sampled ahead.

    Args:
        sample: Samples it, with coroutines within ``cancel``. Called on a daemon thread at once.
        cancel: Ends that early.
    """

    def __init__(self, sample: Callable[[], T], cancel: Cancel) -> None:
        self._cancel = cancel
        self._future: concurrent.futures.Future[T] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._work, args=(sample,), daemon=True, name="grpo-lightning-ahead")
        self._thread.start()

    def _work(self, sample: Callable[[], T]) -> None:
        try:
            result = sample()
        except BaseException as error:
            self._future.set_exception(error)
        else:
            self._future.set_result(result)

    def wait(self) -> None:
        """Wait until it is sampled, or has failed."""
        concurrent.futures.wait([self._future])

    def result(self) -> T:
        """What was sampled, or the exception that ended it, with its own traceback."""
        return self._future.result()

    def cancel(self) -> None:
        """End it, and forget it."""
        self._cancel.ask()
        self._thread.join(_PATIENCE)


def check_ahead(rollouts_ahead: int, correction: object, sleeps: bool = False) -> None:
    """Refuse rollouts of an earlier policy of which the loss knows nothing, and of an engine that sleeps meanwhile.

    Args:
        rollouts_ahead: That of `RolloutDataModule`.
        correction: That of `GRPOModule`.
        sleeps: Whether the engine gives its memory to the trainer while that trains.

    Raises:
        ConfigurationError: If there is no correction, or the engine sleeps.
    """
    if rollouts_ahead and sleeps:
        raise ConfigurationError(
            f"rollouts_ahead={rollouts_ahead} has the engine sample while the trainer trains, but the engine was told "
            "to sleep then; leave out the engine's sleep, or rollouts_ahead"
        )
    if rollouts_ahead and correction is None:
        raise ConfigurationError(
            f"rollouts_ahead={rollouts_ahead} trains on samples of the policy of one epoch earlier: expected a "
            "correction of GRPOModule, such as 'tis_token', which weights them by trainer / engine, but got None"
        )


def require_version(engine: RolloutEngine, version: int) -> None:
    """Refuse to sample ahead with another policy than was declared.

    Raises:
        StaleRolloutError: If the engine serves another version.
    """
    if engine.policy_version != version:
        raise StaleRolloutError(
            f"a rollout is being sampled ahead with policy version {version}, but the engine now serves "
            f"{engine.policy_version}: something loaded weights meanwhile without RolloutDataModule.ensure_synced, "
            "which waits for the rollout"
        )
