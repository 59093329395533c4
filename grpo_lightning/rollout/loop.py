"""One event loop on one background thread, for the whole life of an engine."""

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, TypeVar

T = TypeVar("T")

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.5

_SILENT_SECONDS = 20.0
"""Time without an answer of the loop after which something must be blocking it."""


class Heartbeat:
    """Warns when an event loop does not answer: what blocks it holds up everything, without a sign of its own.

    Args:
        loop: The loop.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._asked: float | None = None

    def check(self) -> None:
        """Ask the loop for an answer, and warn once if the last question has waited too long."""
        if self._asked is None:
            self._asked = time.monotonic()
            self._loop.call_soon_threadsafe(self._answer)
        elif 0 < self._asked < time.monotonic() - _SILENT_SECONDS:
            logger.warning(
                "The rollout's event loop has not answered for %g s: an async environment, tool or reward function "
                "blocks it, and all episodes with it. Make it a plain function, which gets a thread, or await what "
                "takes long",
                _SILENT_SECONDS,
            )
            self._asked = math.inf

    def _answer(self) -> None:
        self._asked = None


class EventLoopThread:
    """Runs coroutines for synchronous callers.

    vLLM's asynchronous client ties itself to the loop it starts on, so ``asyncio.run`` per rollout would break
    it, and fails outright where a loop is already running (notebooks).
    """

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Start the coroutine and return at once."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Wait for the coroutine's result; if the waiting is interrupted (ctrl-C), cancel the coroutine."""
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise RuntimeError("run() was called on the loop's own thread, where it would wait for itself")
        future = None
        try:
            future = self.submit(coroutine)
            heartbeat = Heartbeat(self._loop)
            while True:
                try:
                    # Waiting in slices keeps the main thread able to take signals.
                    return future.result(timeout=_POLL_SECONDS)
                except FutureTimeout:
                    if not self._thread.is_alive():
                        raise RuntimeError("the engine's event loop ended unexpectedly") from None
                    heartbeat.check()
                    if future.done():
                        # It finished just now, or the time-out is its own.
                        return future.result()
        except BaseException:
            if future is not None:
                future.cancel()
            raise

    def leave(self) -> None:
        """Stop the loop when what occupies it is over, without waiting for that."""
        self._loop.call_soon_threadsafe(self._loop.stop)

    def close(self) -> None:
        """Cancel what is running, stop the loop and join its thread. Idempotent."""
        if self._loop.is_closed():
            return

        async def cancel_all() -> None:
            tasks = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        if self._thread.is_alive():
            with contextlib.suppress(FutureTimeout):
                asyncio.run_coroutine_threadsafe(cancel_all(), self._loop).result(timeout=10)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(timeout=10)
        if not self._loop.is_running():
            self._loop.close()
