"""Calling other people's code from an event loop: it may block, hang, or try to end the interpreter."""

import asyncio
import contextlib
import inspect
import threading
from collections.abc import Callable
from functools import partial
from typing import Any


async def call(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Call a plain function in a daemon thread, or await an async one; attempts to exit or to cancel become errors.

    Args:
        function: What to call.
        *args: Its positional arguments.
        **kwargs: Its keyword arguments.
    """
    try:
        if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
            return await function(*args, **kwargs)
        result = await in_daemon_thread(partial(function, *args, **kwargs))
        return await result if inspect.isawaitable(result) else result
    except (Exception, GeneratorExit):
        raise
    except BaseException as error:
        task = asyncio.current_task()
        if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
            raise
        # Also a cancellation that nobody asked for: the event loop would take the caller's task for cancelled.
        raise Contained(described(error)) from error


async def in_daemon_thread(call: Callable[[], Any]) -> Any:
    """Run a blocking call without holding up the loop.

    A call that runs out of time cannot be stopped. In an executor's thread it would keep the interpreter from
    exiting; a daemon thread is left behind.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def work() -> None:
        result: Any = None
        error: Exception | None = None
        try:
            result = call()
        except BaseException as caught:
            error = caught if isinstance(caught, Exception) else Contained(described(caught))
            if isinstance(error, StopIteration):
                # A future cannot carry it.
                error = Contained(described(error))
        # The loop is closed if the run ended meanwhile.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=work, daemon=True, name="grpo-lightning-call").start()
    return await future


class Contained(RuntimeError):
    """What would end the event loop, as an ordinary error: model-written code calls ``exit()``."""


def described(error: BaseException) -> str:
    """Kind and message of an error."""
    return str(error) if isinstance(error, Contained) else f"{type(error).__name__}: {error}"
