"""Other people's code: it may block, hang, or try to end the interpreter."""

import asyncio
import functools
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from grpo_lightning.threads import Contained, call, described, in_daemon_thread


def add(a, *, b=1):
    return a + b


async def add_async(a, *, b=1):
    await asyncio.sleep(0)
    return a + b


def add_later(a, *, b=1):
    return add_async(a, b=b)


class Plain:
    def __call__(self, a, *, b=1):
        return a + b


class Awaited:
    async def __call__(self, a, *, b=1):
        await asyncio.sleep(0)
        return a + b


@pytest.mark.parametrize(
    "function",
    [
        add,
        add_async,
        add_later,
        Plain(),
        Awaited(),
        Plain().__call__,
        Awaited().__call__,
        functools.partial(add),
        functools.partial(add_async),
        lambda a, b: a + b,
    ],
)
def test_everything_that_can_be_called(function):
    assert asyncio.run(call(function, 2, b=3)) == 5


def test_async_functions_run_on_the_loop_and_plain_ones_elsewhere():
    def plain():
        return threading.current_thread()

    async def awaited():
        return threading.current_thread()

    assert asyncio.run(call(awaited)) is threading.current_thread()
    other = asyncio.run(call(plain))
    assert other is not threading.current_thread()
    assert other.daemon


def test_a_slow_plain_function_does_not_hold_up_others():
    async def measure():
        ticks = 0

        async def tick():
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1

        ticking = asyncio.create_task(tick())
        await call(time.sleep, 0.3)
        ticking.cancel()
        return ticks

    assert asyncio.run(measure()) > 5


def test_no_call_waits_for_a_free_thread():
    everybody = threading.Barrier(100)

    async def many():
        # Each goes on only when all of them have begun.
        return await asyncio.gather(*[call(everybody.wait, 20) for _ in range(100)])

    assert sorted(asyncio.run(many())) == list(range(100))


def test_stuck_functions_do_not_starve_others():
    release = threading.Event()

    async def many():
        hanging = [asyncio.create_task(call(release.wait, 20)) for _ in range(40)]
        await asyncio.wait(hanging, timeout=0.1)
        for task in hanging:
            task.cancel()
        return await asyncio.wait_for(call(add, 1), 5)

    try:
        assert asyncio.run(many()) == 2
    finally:
        release.set()


def test_a_result_that_comes_too_late_is_dropped():
    begun, release, ended = threading.Event(), threading.Event(), threading.Event()

    def late():
        begun.set()
        release.wait(20)
        ended.set()
        return 1

    async def give_up():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(in_daemon_thread(late), 0.05)
        release.set()
        while not ended.is_set():
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)

    complaints = []
    with asyncio.Runner() as runner:
        runner.get_loop().set_exception_handler(lambda loop, context: complaints.append(context))
        runner.run(give_up())
    assert begun.is_set()
    assert complaints == []


def test_a_stuck_function_does_not_keep_the_process_alive():
    program = textwrap.dedent(
        """
        import asyncio, time
        from grpo_lightning.threads import call

        async def main():
            try:
                await asyncio.wait_for(call(time.sleep, 120), 0.1)
            except TimeoutError:
                print("too long", end=" ")

        asyncio.run(main())
        print("end", flush=True)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        output, _ = process.communicate(timeout=40)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        pytest.fail(f"the process did not end; it printed {output!r}")
    assert output == "too long end\n"
    assert process.returncode == 0


def raises(error):
    def function():
        raise error

    async def function_async():
        raise error

    def function_later():
        return function_async()

    return [function, function_async, function_later]


@pytest.mark.parametrize("function", raises(KeyError("cause")))
def test_errors_come_through(function):
    with pytest.raises(KeyError, match="cause"):
        asyncio.run(call(function))


@pytest.mark.parametrize("function", [*raises(SystemExit(3)), lambda: sys.exit(3)])
def test_attempts_to_exit_become_errors(function):
    # Let through, it ends the event loop, and whoever waits for the rollout waits for ever.
    with pytest.raises(Contained, match="^SystemExit: 3$"):
        asyncio.run(call(function))


@pytest.mark.parametrize("function", raises(KeyboardInterrupt()))
def test_interrupts_of_others_become_errors(function):
    with pytest.raises(Contained, match="^KeyboardInterrupt: $"):
        asyncio.run(call(function))


class Panic(BaseException):
    """Not an Exception, as panics of Rust extensions are not."""


@pytest.mark.parametrize("error", [Panic("lost"), asyncio.CancelledError("lost")])
def test_what_would_cancel_the_caller_becomes_an_error(error):
    async def rollout():
        for function in raises(error):
            with pytest.raises(Contained, match=f"^{type(error).__name__}: lost$"):
                await call(function)

    asyncio.run(rollout())


def test_a_stop_iteration_which_no_future_can_carry():
    with pytest.raises(Contained, match="^StopIteration: empty$"):
        asyncio.run(asyncio.wait_for(call(raises(StopIteration("empty"))[0]), 5))


def test_cancellation_comes_through():
    async def cancel(function):
        running = asyncio.create_task(call(function, 5))
        await asyncio.sleep(0.05)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(cancel(asyncio.sleep))
    asyncio.run(cancel(time.sleep))


def test_errors_are_described_once():
    assert described(ValueError("no")) == "ValueError: no"
    assert described(Contained(described(SystemExit(3)))) == "SystemExit: 3"
