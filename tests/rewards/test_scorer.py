import asyncio
import functools
import math
import sys
import time

import pytest
import torch

from grpo_lightning.errors import ConfigurationError, RewardError
from grpo_lightning.rewards import Scorer
from grpo_lightning.rewards.scorer import Score
from grpo_lightning.rollout.episode import Episode, Turn, said
from grpo_lightning.rollout.types import Action, Task

TASK = Task("sum-1", ({"role": "user", "content": "2+2?"},), {"answer": "4", "level": 3})


def score(*functions, completion="it is 4", task=TASK, **settings):
    return asyncio.run(Scorer(functions, **settings).score(task, said(task, completion)))


def exact(completion, answer):
    return float(answer in completion)


def length(completion):
    return len(completion)


def test_completion_goes_first_and_fields_by_name():
    seen = {}

    def reward(text, level, answer, *, prompt, task_id):
        seen.update(text=text, level=level, answer=answer, prompt=prompt, task_id=task_id)
        return 1

    assert score(reward) == Score({"reward": 1.0}, 1.0)
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
    assert seen.pop("episode").text == "it is 4"
    assert seen == {"prompt": TASK.messages, "task_id": "sum-1", "answer": "4", "level": 3}


def test_a_field_named_like_the_first_parameter_is_no_conflict():
    # JSON Lines files with a reference "completion" are common.
    task = Task("t", TASK.messages, {"completion": "the reference", "answer": "4"})

    def by_name(completion, answer):
        return float(completion == "sampled")

    def with_all(completion, **fields):
        return float(completion == "sampled")

    assert score(by_name, with_all, completion="sampled", task=task) == Score({"by_name": 1.0, "with_all": 1.0}, 2.0)


def test_task_data_come_before_our_own_fields():
    task = Task("t", TASK.messages, {"prompt": "the record's own"})
    assert score(lambda completion, prompt: float(prompt == "the record's own"), task=task).total == 1.0


def test_the_episode_goes_by_name_and_the_text_is_that_of_its_last_turn():
    def turn(text, was_forced=False):
        return Turn((), Action(text, (), (), 0.0, was_forced, "stop", 0), reward=0.5)

    episode = Episode((turn("left"), turn("right", was_forced=True), turn("left again")), (), {}, None)
    seen = {}

    def count(completion, *, episode):
        seen.update(completion=completion, episode=episode)
        return sum(turn.action.was_forced for turn in episode.turns)

    async def everything(completion, **fields):
        return len(fields["episode"].turns)

    scorer = Scorer([count, everything])
    scorer.check(TASK)
    assert asyncio.run(scorer.score(TASK, episode)) == Score({"count": 1.0, "everything": 3.0}, 4.0)
    assert seen["completion"] == "left again"
    assert seen["episode"] is episode


def test_an_episode_without_turns_said_nothing():
    broken = Episode((), (), {}, None, "error")
    assert asyncio.run(Scorer([length]).score(TASK, broken)) == Score({"length": 0.0}, 0.0)


def test_async_functions_are_awaited():
    async def reward(completion, answer):
        await asyncio.sleep(0)
        return exact(completion, answer)

    assert score(reward) == Score({"reward": 1.0}, 1.0)


def test_objects_with_call_and_with_async_call():
    class Plain:
        def __call__(self, completion, answer):
            return 0.25

    class Awaited:
        async def __call__(self, completion, answer):
            await asyncio.sleep(0)
            return 0.5

    found = score(Plain(), Awaited())
    assert found.rewards == {"Plain": 0.25, "Awaited": 0.5}
    assert found.total == 0.75
    assert found.failure is None


def test_plain_functions_that_return_an_awaitable_and_partials():
    async def inner(completion, factor):
        return factor * len(completion)

    def scaled(completion, factor):
        return factor * len(completion)

    def outer(completion):
        return inner(completion, factor=2)

    assert score(outer, completion="abc").total == 6.0
    assert score(functools.partial(inner, factor=3), completion="abc").total == 9.0
    assert score(functools.partial(scaled, factor=4), completion="abc").total == 12.0


def test_weighted_sum():
    found = score(exact, length, weights=[2.0, -0.5])
    assert found.rewards == {"exact": 1.0, "length": 7.0}
    assert found.total == 2.0 - 3.5
    assert found.failure is None


def test_none_takes_a_reward_out_of_the_sum():
    def never(completion):
        return None

    assert score(never, exact, weights=[5.0, 2.0]) == Score({"never": None, "exact": 1.0}, 2.0)
    found = score(never)
    # Whether the environment has a reward for it is not known here.
    assert found == Score({"never": None}, None)


def test_zero_is_a_reward():
    assert score(lambda completion: 0) == Score({"lambda": 0.0}, 0.0)


@pytest.mark.parametrize("value", [True, False, 1, 0.5, -3.0, torch.tensor(0.5), torch.tensor([2])])
def test_numbers_of_all_kinds_become_floats(value):
    found = score(lambda completion: value)
    assert found.rewards["lambda"] == found.total == float(value)
    assert type(found.total) is float
    assert type(found.rewards["lambda"]) is float


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
    time.sleep(2)
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
    found = score(function, exact, on_error="skip")
    assert found.rewards == {"exact": 1.0}
    assert found.total is None
    assert f"reward '{function.__name__}' raised KeyError" in found.failure


@pytest.mark.parametrize("function", [stuck, stuck_async])
def test_running_out_of_time_stops_the_run_by_default(function):
    begin = time.monotonic()
    with pytest.raises(RewardError, match=f"reward '{function.__name__}' took longer than 0.05 s on task 'sum-1'"):
        score(function, timeout=0.05)
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize("function", [stuck, stuck_async])
def test_running_out_of_time_can_be_skipped(function):
    found = score(function, exact, timeout=0.5, on_error="skip")
    assert found.rewards == {"exact": 1.0}
    assert found.total is None
    assert found.failure == f"reward '{function.__name__}' took longer than 0.5 s on task 'sum-1'"


def test_all_failures_are_told():
    failure = score(broken, stuck_async, timeout=0.05, on_error="skip").failure
    assert "raised KeyError" in failure
    assert "took longer" in failure


def test_each_function_has_its_own_time():
    def nap(completion):
        time.sleep(0.6)
        return 1

    def nap_too(completion):
        time.sleep(0.6)
        return 1

    assert score(nap, nap_too, timeout=1.1).total == 2.0


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
        scorer = Scorer([nap], timeout=1.0)
        return await asyncio.gather(*[scorer.score(TASK, said(TASK, str(i))) for i in range(100)])

    assert [found.total for found in asyncio.run(many())] == [1.0] * 100


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
    assert "raised SystemExit" in score(function, on_error="skip").failure


def test_cancellation_is_not_a_reward_failure():
    async def cancel():
        running = asyncio.create_task(Scorer([stuck_async], on_error="skip").score(TASK, said(TASK, "")))
        await asyncio.sleep(0.05)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(cancel())


def test_no_function_has_nothing_to_say():
    # The environment may give all rewards.
    assert score() == Score({}, None)
    scorer = Scorer([])
    assert scorer.names == ()
    scorer.check(TASK)


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
    found = asyncio.run(scorer.score(TASK, said(TASK, "4")))
    assert sorted(found.rewards.values()) == [1.0, 1.0, 10.0, 100.0]
    assert found.total == 1.0 + 10.0 + 100.0 + 3.0


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


@pytest.mark.parametrize("name", ["mean", "std", "failed", "environment"])
def test_names_of_metrics_are_refused(name):
    def reward(completion):
        return 1.0

    reward.__name__ = name
    with pytest.raises(ConfigurationError, match=f"another name than {name}"):
        Scorer([reward])
