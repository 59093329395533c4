import asyncio
import contextlib
import os
import signal
import threading
import time
from concurrent.futures import Future

import pytest

from grpo_lightning.rollout import loop as loop_module
from grpo_lightning.rollout.loop import EventLoopThread


@pytest.fixture
def loop():
    loop = EventLoopThread("test-loop")
    yield loop
    loop.close()


def threads():
    return [t for t in threading.enumerate() if t.name == "test-loop"]


async def value(result):
    await asyncio.sleep(0)
    return result


def test_run_returns_the_result_of_another_thread(loop):
    async def where():
        return threading.current_thread().name

    assert loop.run(where()) == "test-loop"
    assert loop.run(value(3)) == 3
    assert loop.run(value(None)) is None


def test_run_raises_what_the_coroutine_raises(loop):
    error = KeyError("x")

    async def fail():
        raise error

    with pytest.raises(KeyError) as caught:
        loop.run(fail())
    assert caught.value is error
    assert loop.run(value(1)) == 1


def test_all_coroutines_share_one_loop(loop):
    async def running():
        return asyncio.get_running_loop()

    assert loop.run(running()) is loop.run(running())


def test_submit_returns_at_once(loop):
    release = threading.Event()

    async def wait():
        await asyncio.to_thread(release.wait, 10)
        return "done"

    future = loop.submit(wait())
    assert not future.done()
    assert loop.run(value("meanwhile")) == "meanwhile"
    release.set()
    assert future.result(timeout=10) == "done"


def test_run_works_where_a_loop_is_already_running(loop):
    async def notebook():
        return loop.run(value("inner"))

    assert asyncio.run(notebook()) == "inner"


def test_run_from_several_threads(loop):
    results = []

    def ask(number):
        async def slow():
            await asyncio.sleep(0.05)
            return number

        results.append(loop.run(slow()))

    asking = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    begin = time.monotonic()
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join(10)
    assert sorted(results) == list(range(8))
    assert time.monotonic() - begin < 5


def test_run_waits_longer_than_a_poll(loop, monkeypatch):
    monkeypatch.setattr(loop_module, "_POLL_SECONDS", 0.02)

    async def slow():
        await asyncio.sleep(0.2)
        return "late"

    assert loop.run(slow()) == "late"


def test_a_timeout_in_the_coroutine_is_the_coroutines(loop, monkeypatch):
    monkeypatch.setattr(loop_module, "_POLL_SECONDS", 0.02)

    async def fail():
        await asyncio.sleep(0.1)
        raise TimeoutError("mine")

    with pytest.raises(TimeoutError, match="mine"):
        loop.run(fail())


def test_a_result_that_arrives_just_after_a_poll_is_not_lost(loop, monkeypatch):
    class Late(Future):
        def result(self, timeout=None):
            if not self.done() and timeout is not None:
                self.set_result("arrived")
                raise TimeoutError
            return super().result(timeout)

    late = Late()

    def submit(coroutine):
        coroutine.close()
        return late

    def arrive():
        with contextlib.suppress(Exception):
            late.set_result("arrived")

    monkeypatch.setattr(loop, "submit", submit)
    timer = threading.Timer(0.3, arrive)
    timer.start()
    try:
        assert loop.run(value(None)) == "arrived"
    finally:
        timer.cancel()


def test_run_on_its_own_thread_is_refused(loop):
    async def nested():
        coroutine = value(1)
        with pytest.raises(RuntimeError, match="own thread"):
            loop.run(coroutine)
        return coroutine.cr_frame

    # The refused coroutine is closed, so that Python does not complain that it was never awaited.
    assert loop.run(nested()) is None


def test_interruption_cancels_the_coroutine(loop):
    assert threading.current_thread() is threading.main_thread()
    started, cancelled = threading.Event(), threading.Event()

    async def hang():
        started.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    def interrupt():
        started.wait(10)
        # Until the main thread waits.
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        loop.run(hang())
    assert cancelled.wait(5)
    assert time.monotonic() - begin < 20
    assert loop.run(value("still alive")) == "still alive"


def test_close_cancels_what_is_running_and_ends_the_thread(loop):
    assert len(threads()) == 1
    cancelled = threading.Event()
    started = threading.Event()

    async def hang():
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    future = loop.submit(hang())
    assert started.wait(5)
    loop.close()
    assert cancelled.is_set()
    assert future.cancelled()
    assert threads() == []


def test_close_is_idempotent_and_use_afterwards_is_refused(loop):
    loop.close()
    loop.close()
    coroutine = value(1)
    with pytest.raises(RuntimeError):
        loop.run(coroutine)
    coroutine.close()


def test_close_wakes_who_waits(loop):
    outcome = []

    def wait():
        try:
            loop.run(asyncio.sleep(60))
        except BaseException as error:
            outcome.append(type(error).__name__)

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.1)
    loop.close()
    waiting.join(10)
    assert not waiting.is_alive()
    assert outcome == ["CancelledError"]


def test_thread_does_not_keep_the_process_alive(loop):
    [thread] = threads()
    assert thread.daemon


def test_a_loop_that_is_blocked_is_named(monkeypatch, caplog):
    monkeypatch.setattr("grpo_lightning.rollout.loop._POLL_SECONDS", 0.05)
    monkeypatch.setattr("grpo_lightning.rollout.loop._SILENT_SECONDS", 0.2)

    async def blocks():
        time.sleep(2)

    async def waits():
        await asyncio.sleep(0.8)

    loop = EventLoopThread("blocked")
    try:
        loop.run(waits())
        assert "has not answered" not in caplog.text
        loop.run(blocks())
    finally:
        loop.close()
    assert caplog.text.count("has not answered for 0.2 s: an async environment, tool or reward function blocks it") == 1
