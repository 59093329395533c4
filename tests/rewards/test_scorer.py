import asyncio
import functools
import math
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch

from grpo_lightning.errors import ConfigurationError, RewardError
from grpo_lightning.rewards import Scorer
from grpo_lightning.rollout.types import Task

TASK = Task("sum-1", ({"role": "user", "content": "2+2?"},), {"answer": "4", "level": 3})


def score(*functions, completion="it is 4", task=TASK, **settings):
    return asyncio.run(Scorer(functions, **settings).score(task, completion))


def exact(completion, answer):
    return float(answer in completion)


def length(completion):
    return len(completion)


def test_completion_goes_first_and_fields_by_name():
    seen = {}

    def reward(text, level, answer, *, prompt, task_id):
        seen.update(text=text, level=level, answer=answer, prompt=prompt, task_id=task_id)
        return 1

    assert score(reward) == ({"reward": 1.0}, 1.0, None)
    assert seen == {"text": "it is 4", "level": 3, "answer": "4", "prompt": TASK.messages, "task_id": "sum-1"}


def test_defaults_fill_what_the_task_lacks_and_give_way_to_what_it_has():
    seen = {}

    def reward(completion, level=0, other="default"):
        seen.update(level=level, other=other)
        return 0

    score(reward)
    assert seen == {"level": 3, "other": "default"}


def test_kwargs_receive_every_field():
    seen = {}

    def reward(completion, **fields):
        seen.update(fields)
        return 0

    score(reward)
    assert seen == {"prompt": TASK.messages, "task_id": "sum-1", "answer": "4", "level": 3}


def test_a_field_named_like_the_first_parameter_is_no_conflict():
    # JSON Lines files with a reference "completion" are common.
    task = Task("t", TASK.messages, {"completion": "the reference", "answer": "4"})

    def by_name(completion, answer):
        return float(completion == "sampled")

    def with_all(completion, **fields):
        return float(completion == "sampled")

    assert score(by_name, with_all, completion="sampled", task=task) == ({"by_name": 1.0, "with_all": 1.0}, 2.0, None)


def test_task_data_come_before_our_own_fields():
    task = Task("t", TASK.messages, {"prompt": "the record's own"})
    assert score(lambda completion, prompt: float(prompt == "the record's own"), task=task)[1] == 1.0


def test_async_functions_are_awaited():
    async def reward(completion, answer):
        await asyncio.sleep(0)
        return exact(completion, answer)

    assert score(reward) == ({"reward": 1.0}, 1.0, None)


def test_objects_with_call_and_with_async_call():
    class Plain:
        def __call__(self, completion, answer):
            return 0.25

    class Awaited:
        async def __call__(self, completion, answer):
            await asyncio.sleep(0)
            return 0.5

    rewards, total, failure = score(Plain(), Awaited())
    assert rewards == {"Plain": 0.25, "Awaited": 0.5}
    assert total == 0.75
    assert failure is None


def test_plain_functions_that_return_an_awaitable_and_partials():
    async def inner(completion, factor):
        return factor * len(completion)

    def scaled(completion, factor):
        return factor * len(completion)

    def outer(completion):
        return inner(completion, factor=2)

    assert score(outer, completion="abc")[1] == 6.0
    assert score(functools.partial(inner, factor=3), completion="abc")[1] == 9.0
    assert score(functools.partial(scaled, factor=4), completion="abc")[1] == 12.0


def test_async_functions_run_on_the_loop_and_plain_ones_elsewhere():
    threads = {}

    def plain(completion):
        threads["plain"] = threading.current_thread()
        return 0

    async def awaited(completion):
        threads["awaited"] = threading.current_thread()
        return 0

    score(plain, awaited)
    assert threads["awaited"] is threading.current_thread()
    assert threads["plain"] is not threading.current_thread()


def test_a_slow_plain_function_does_not_hold_up_others():
    def slow(completion):
        time.sleep(0.3)
        return 0

    async def measure():
        ticks = 0

        async def tick():
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1

        ticking = asyncio.create_task(tick())
        await Scorer([slow]).score(TASK, "")
        ticking.cancel()
        return ticks

    assert asyncio.run(measure()) > 5


def test_weighted_sum():
    rewards, total, failure = score(exact, length, weights=[2.0, -0.5])
    assert rewards == {"exact": 1.0, "length": 7.0}
    assert total == 2.0 - 3.5
    assert failure is None


def test_none_takes_a_reward_out_of_the_sum():
    def never(completion):
        return None

    assert score(never, exact, weights=[5.0, 2.0]) == ({"never": None, "exact": 1.0}, 2.0, None)
    rewards, total, failure = score(never)
    assert rewards == {"never": None}
    assert total is None
    assert failure == "no reward applies to this task"


def test_zero_is_a_reward():
    assert score(lambda completion: 0) == ({"lambda": 0.0}, 0.0, None)


@pytest.mark.parametrize("value", [True, False, 1, 0.5, -3.0, torch.tensor(0.5), torch.tensor([2])])
def test_numbers_of_all_kinds_become_floats(value):
    rewards, total, _ = score(lambda completion: value)
    assert rewards["lambda"] == total == float(value)
    assert type(total) is float
    assert type(rewards["lambda"]) is float


@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, "1.0", "yes", [1.0], {}, (), object(), torch.zeros(2)]
)
def test_what_is_no_reward_is_refused_even_when_errors_are_skipped(value, on_error):
    def wrong(completion):
        return value

    with pytest.raises(RewardError, match="expected reward 'wrong' to return a finite number or None") as caught:
        score(wrong, on_error=on_error)
    assert "'sum-1'" in str(caught.value)
    assert "'it is 4'" in str(caught.value)


def broken(completion):
    raise KeyError("cause")


async def broken_async(completion):
    raise KeyError("cause")


def stuck(completion):
    time.sleep(0.4)
    return 1.0


async def stuck_async(completion):
    await asyncio.sleep(60)


@pytest.mark.parametrize("function", [broken, broken_async])
def test_raising_stops_the_run_by_default(function):
    with pytest.raises(
        RewardError, match=f"reward '{function.__name__}' raised KeyError: 'cause' on task 'sum-1'"
    ) as c:
        score(exact, function)
    assert isinstance(c.value.__cause__, KeyError)
    assert "'it is 4'" in str(c.value)


@pytest.mark.parametrize("function", [broken, broken_async])
def test_raising_can_be_skipped(function):
    rewards, total, failure = score(function, exact, on_error="skip")
    assert rewards == {"exact": 1.0}
    assert total is None
    assert f"reward '{function.__name__}' raised KeyError" in failure


@pytest.mark.parametrize("function", [stuck, stuck_async])
def test_running_out_of_time_stops_the_run_by_default(function):
    begin = time.monotonic()
    with pytest.raises(RewardError, match=f"reward '{function.__name__}' took longer than 0.05 s on task 'sum-1'"):
        score(function, timeout=0.05)
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize("function", [stuck, stuck_async])
def test_running_out_of_time_can_be_skipped(function):
    rewards, total, failure = score(function, exact, timeout=0.05, on_error="skip")
    assert rewards == {"exact": 1.0}
    assert total is None
    assert failure == f"reward '{function.__name__}' took longer than 0.05 s on task 'sum-1'"


def test_all_failures_are_told():
    failure = score(broken, stuck_async, timeout=0.05, on_error="skip")[2]
    assert "raised KeyError" in failure
    assert "took longer" in failure


def test_each_function_has_its_own_time():
    def nap(completion):
        time.sleep(0.2)
        return 1

    def nap_too(completion):
        time.sleep(0.2)
        return 1

    assert score(nap, nap_too, timeout=0.35)[1] == 2.0


def test_a_timeout_inside_the_function_is_its_own_error():
    # For example an HTTP client that gave up after a second: our limit has nothing to do with it.
    def request(completion):
        raise TimeoutError("the judge did not answer")

    with pytest.raises(RewardError, match="raised TimeoutError: the judge did not answer"):
        score(request, timeout=30)


def test_waiting_for_a_free_thread_is_not_the_functions_time():
    def nap(completion):
        time.sleep(0.1)
        return 1.0

    async def many():
        scorer = Scorer([nap], timeout=0.5)
        return await asyncio.gather(*[scorer.score(TASK, str(i)) for i in range(100)])

    assert [total for _, total, _ in asyncio.run(many())] == [1.0] * 100


def test_stuck_functions_do_not_starve_others():
    release = threading.Event()

    def hang(completion):
        release.wait(20)
        return 0.0

    async def many():
        hanging = Scorer([hang], timeout=0.1, on_error="skip")
        await asyncio.gather(*[hanging.score(TASK, str(i)) for i in range(40)])
        return await Scorer([exact], timeout=2.0).score(TASK, "4")

    try:
        loop = asyncio.new_event_loop()
        assert loop.run_until_complete(many())[1] == 1.0
    finally:
        release.set()
        loop.close()


def test_a_stuck_function_does_not_keep_the_process_alive():
    program = textwrap.dedent(
        """
        import time
        from grpo_lightning.rewards import Scorer
        from grpo_lightning.rollout.loop import EventLoopThread
        from grpo_lightning.rollout.types import Task

        def hang(completion):
            time.sleep(120)

        loop = EventLoopThread("test")
        rewards, total, failure = loop.run(Scorer([hang], timeout=0.1, on_error="skip").score(Task("t", (), {}), ""))
        loop.close()
        print(failure, "end", flush=True)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        output, _ = process.communicate(timeout=40)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        pytest.fail(f"the process did not end; it printed {output!r}")
    assert "took longer" in output
    assert output.endswith("end\n")
    assert process.returncode == 0


def leave(completion):
    sys.exit(3)


async def leave_async(completion):
    sys.exit(3)


@pytest.mark.parametrize("function", [leave, leave_async])
def test_a_function_that_exits_has_raised(function):
    # Rewards that execute generated code meet exit() sooner or later. Let through, it ends the engine's event loop,
    # and whoever waits for the rollout waits for ever.
    with pytest.raises(RewardError, match="raised SystemExit: 3"):
        score(function)
    assert "raised SystemExit" in score(function, on_error="skip")[2]


def test_cancellation_is_not_a_reward_failure():
    async def cancel():
        running = asyncio.create_task(Scorer([stuck_async], on_error="skip").score(TASK, ""))
        await asyncio.sleep(0.05)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(cancel())


def test_no_function_is_refused():
    with pytest.raises(ConfigurationError, match="at least one reward function"):
        Scorer([])


@pytest.mark.parametrize("weights", [[], [1.0], [1.0, 2.0, 3.0]])
def test_one_weight_per_function(weights):
    with pytest.raises(ConfigurationError, match=f"got {len(weights)} for 2"):
        Scorer([exact, length], weights=weights)


@pytest.mark.parametrize("timeout", [0, -1.0, math.nan])
def test_time_limit_must_be_positive(timeout):
    with pytest.raises(ConfigurationError, match="timeout > 0"):
        Scorer([exact], timeout=timeout)


def test_names_are_unique_and_nothing_is_lost():
    def other(completion):
        return 10.0

    other.__name__ = "exact"

    def third(completion):
        return 100.0

    third.__name__ = "exact_2"
    functions = [exact, other, third, exact]
    scorer = Scorer(functions, weights=[1.0, 1.0, 1.0, 3.0])
    assert scorer.names[:2] == ("exact", "exact_2")
    assert len(set(scorer.names)) == 4
    rewards, total, _ = asyncio.run(scorer.score(TASK, "4"))
    assert sorted(rewards.values()) == [1.0, 1.0, 10.0, 100.0]
    assert total == 1.0 + 10.0 + 100.0 + 3.0


def test_names_of_partials_and_objects():
    class Judge:
        def __call__(self, completion):
            return 0

    assert Scorer([functools.partial(exact, answer="4"), Judge(), Judge()]).names == ("partial", "Judge", "Judge_2")


def test_names_are_fit_for_every_logger():
    def named(name):
        def reward(completion):
            return 0

        reward.__name__ = name
        return reward

    given = ["<lambda>", "<lambda>", "_private", "länge", "a b|c", "長さ"]
    assert Scorer([named(name) for name in given]).names == (
        "lambda",
        "lambda_2",
        "_private",
        "l_nge",
        "a_b_c",
        "reward",
    )


def test_check_accepts_what_can_be_called():
    def all_kinds(text, answer, *rest, prompt, task_id, optional=1, **others):
        return 0

    class Judge:
        async def __call__(self, completion, level):
            return 0

    Scorer([exact, length, all_kinds, Judge(), lambda c, **fields: 0]).check(TASK)


@pytest.mark.parametrize("kind", ["positional", "keyword", "object"])
def test_check_names_function_parameter_and_fields(kind):
    def positional(completion, solution, answer):
        return 0

    def keyword(completion, *, answer, solution):
        return 0

    class Judge:
        __name__ = "object"

        def __call__(self, completion, solution):
            return 0

    function = {"positional": positional, "keyword": keyword, "object": Judge()}[kind]
    with pytest.raises(ConfigurationError, match=f"reward '{kind}' asks for 'solution', but") as caught:
        Scorer([exact, function]).check(TASK)
    assert "the tasks have 'answer', 'level', 'prompt', 'task_id'" in str(caught.value)


def test_check_names_every_missing_parameter():
    with pytest.raises(ConfigurationError, match="asks for 'one', 'two', but"):
        Scorer([lambda completion, one, answer, two: 0]).check(TASK)


def test_check_refuses_a_function_without_arguments():
    def nothing():
        return 1.0

    with pytest.raises(ConfigurationError, match="'nothing' to take the completion, but it takes no argument"):
        Scorer([nothing]).check(TASK)


@pytest.mark.parametrize("name", ["mean", "std", "failed"])
def test_names_of_metrics_are_refused(name):
    def reward(completion):
        return 1.0

    reward.__name__ = name
    with pytest.raises(ConfigurationError, match=f"another name than {name}"):
        Scorer([reward])
