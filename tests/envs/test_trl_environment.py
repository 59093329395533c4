import asyncio

import pytest

from grpo_lightning.envs.trl import TRLEnvironment
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.rollout.types import Action, Task, ToolCall

SYSTEM = {"role": "system", "content": "Count."}
TASK = Task("t", (SYSTEM, {"role": "user", "content": "Go. "}), {"start": 5, "answer": "7"})


class Counter:
    """Counts, as an environment for TRL does."""

    @property
    def broken(self):
        raise RuntimeError("properties are not read")

    def reset(self, start, **row):
        self.count = start
        self.row = row
        return f"It shows {start}."

    def add(self, amount: int) -> int:
        """Add to the counter.

        Args:
            amount: How much.
        """
        self.count += amount
        return self.count

    def _hidden(self):
        return 0

    def get_reward(self):
        return float(self.count == 7)


class Quiet:
    async def reset(self, **row):
        self.count = 0

    def look(self) -> int:
        """Read the counter."""
        return self.count


class Asked(Counter):
    async def get_reward(self):
        return 0.5


class NoReset:
    def add(self, amount: int) -> int:
        return amount


class Pictures(Counter):
    def reset(self, **row):
        return [{"type": "image"}]


def said(text, *calls):
    return Action(text, (), (), 0.0, True, "stop", -1, calls)


def test_an_episode():
    environment = TRLEnvironment(Counter)

    async def episode():
        begin = await environment.reset(TASK)
        answers = [
            await environment.step(said("", ToolCall("add", {"amount": 2}, "1"))),
            await environment.step(said("7")),
        ]
        score = await environment.score(None)
        environment.close()
        return begin, *answers, score

    begin, result, end, score = asyncio.run(episode())
    assert begin.messages == (SYSTEM, {"role": "user", "content": "Go. It shows 5."})
    assert [tool["function"]["name"] for tool in begin.tools] == ["add"]
    assert [message["content"] for message in result.messages] == ["7"]
    assert not result.terminated
    assert end.terminated
    assert score == {"Counter": 1.0}


def test_reset_is_given_the_row():
    counters = []
    environment = TRLEnvironment(lambda: counters.append(Counter()) or counters[-1])
    asyncio.run(environment.reset(TASK))
    assert counters[0].row == {"answer": "7", "prompt": [dict(message) for message in TASK.messages]}


def test_reset_may_say_nothing():
    begin = asyncio.run(TRLEnvironment(Quiet).reset(TASK))
    assert begin.messages == TASK.messages


def test_without_messages_the_observation_is_the_prompt():
    begin = asyncio.run(TRLEnvironment(Counter).reset(Task("t", (), {"start": 1})))
    assert begin.messages == ({"role": "user", "content": "It shows 1."},)


def test_an_environment_may_leave_rewards_to_functions():
    assert asyncio.run(TRLEnvironment(Quiet).score(None)) == {}


def test_an_async_reward():
    assert asyncio.run(TRLEnvironment(Asked).score(None)) == {"Asked": 0.5}


def test_every_episode_has_its_own_object():
    first, second = TRLEnvironment(Counter), TRLEnvironment(Counter)

    async def play():
        for environment in (first, second):
            await environment.reset(TASK)
        await first.step(said("", ToolCall("add", {"amount": 2}, "1")))
        return await first.score(None), await second.score(None)

    assert asyncio.run(play()) == ({"Counter": 1.0}, {"Counter": 0.0})


def test_a_reset_is_needed():
    with pytest.raises(
        ConfigurationError, match=r"expected NoReset to have a method reset\(\*\*row\), but there is none"
    ):
        TRLEnvironment(NoReset)


def test_pictures_are_refused():
    with pytest.raises(ConfigurationError, match=r"expected Pictures.reset\(\) to return a text or None, but got \[\{"):
        asyncio.run(TRLEnvironment(Pictures).reset(TASK))


def test_the_format_of_calls_is_passed_on():
    assert asyncio.run(TRLEnvironment(Counter, tool_format="mistral").reset(TASK)).tool_format == "mistral"
