"""What is sampled on a thread of its own, and how it is ended."""

import asyncio
import threading
import time
import traceback

import pytest
from fakes import FakeEngine

from grpo_lightning.errors import ConfigurationError, RewardError, StaleRolloutError
from grpo_lightning.rollout.ahead import Ahead, Cancel, check_ahead, require_version
from grpo_lightning.rollout.loop import EventLoopThread


@pytest.fixture
def loop():
    loop = EventLoopThread("test-ahead")
    yield loop
    loop.close()


def test_the_result_is_waited_for():
    go = threading.Event()
    ahead = Ahead(lambda: go.wait(10) and "sampled", Cancel())
    threading.Timer(0.2, go.set).start()
    begin = time.perf_counter()
    ahead.wait()
    assert 0.1 < time.perf_counter() - begin < 5
    assert ahead.result() == "sampled"


def test_an_exception_keeps_its_type_and_traceback():
    def judge_of_mine():
        raise RewardError("no")

    ahead = Ahead(judge_of_mine, Cancel())
    ahead.wait()
    with pytest.raises(RewardError, match="no") as caught:
        ahead.result()
    assert "judge_of_mine" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]


def test_the_thread_does_not_keep_the_interpreter():
    ahead = Ahead(lambda: None, Cancel())
    assert ahead._thread.daemon


def endless(loop):
    """What goes on until it is cancelled, and has begun."""
    cancel, begun = Cancel(), threading.Event()

    async def work():
        begun.set()
        await asyncio.sleep(3600)

    ahead = Ahead(lambda: loop.run(cancel.within(work())), cancel)
    assert begun.wait(10)
    return ahead


def test_cancelling_ends_what_runs_at_once(loop):
    ahead = endless(loop)
    begin = time.monotonic()
    ahead.cancel()
    assert time.monotonic() - begin < 3
    assert not ahead._thread.is_alive()


def test_cancelling_ends_what_would_come(loop):
    """Between two of its engine's runs a rollout holds nothing that could be cancelled."""
    cancel, between, go, ran = Cancel(), threading.Event(), threading.Event(), []

    async def part(name):
        ran.append(name)

    def sample():
        loop.run(cancel.within(part("first")))
        between.set()
        go.wait(10)
        loop.run(cancel.within(part("second")))

    ahead = Ahead(sample, cancel)
    assert between.wait(10)
    cancel.ask()
    go.set()
    ahead.cancel()
    assert not ahead._thread.is_alive()
    assert ran == ["first"]


def test_cancelling_after_the_loop_is_closed_is_nothing(loop):
    ahead = endless(loop)
    loop.close()
    ahead.cancel()
    assert not ahead._thread.is_alive()


def test_a_correction_is_needed():
    with pytest.raises(ConfigurationError, match=r"rollouts_ahead=1 .* expected a correction of GRPOModule"):
        check_ahead(1, None)
    check_ahead(1, "tis_token")
    check_ahead(0, None)


def test_another_version_is_refused():
    require_version(FakeEngine(), -1)
    with pytest.raises(StaleRolloutError, match="ahead with policy version 3, but the engine now serves -1"):
        require_version(FakeEngine(), 3)


def test_an_engine_that_sleeps_meanwhile_is_refused():
    with pytest.raises(ConfigurationError, match="was told to sleep"):
        check_ahead(1, "tis_token", sleeps=True)
    check_ahead(0, None, sleeps=True)
