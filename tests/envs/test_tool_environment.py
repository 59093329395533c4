import asyncio
import time
from collections.abc import Callable

import pytest
from jsonargparse import ArgumentParser

from grpo_lightning.envs import Environment, ToolEnvironment, calculator
from grpo_lightning.envs.tool_calls import parse_tool_calls
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.rollout.types import Action, Task

TASK = Task("sum", ({"role": "user", "content": "What is 3 + 4?"},))


def said(text, format="auto"):
    return Action(text, (), (), 0.0, False, "stop", 0, parse_tool_calls(text, format))


def step(environment, text):
    return asyncio.run(environment.step(said(text)))


def ask(expression):
    return f'<tool_call>{{"name": "calculator", "arguments": {{"expression": "{expression}"}}}}</tool_call>'


def test_an_episode():
    environment = ToolEnvironment([calculator], tool_format="hermes")
    start = asyncio.run(environment.reset(TASK))
    assert start.messages == TASK.messages
    assert [tool["function"]["name"] for tool in start.tools] == ["calculator"]
    assert (start.tool_format, start.reward, start.terminated) == ("hermes", None, False)
    answer = step(environment, "Two at once." + ask("3 + 4") + ask("3 * 4"))
    assert answer.messages == (
        {"role": "tool", "name": "calculator", "tool_call_id": "call_0", "content": "7"},
        {"role": "tool", "name": "calculator", "tool_call_id": "call_1", "content": "12"},
    )
    assert (answer.error, answer.reward, answer.terminated) == (None, None, False)
    assert answer.info == {"tool_calls": 2, "tool_errors": 0}
    end = step(environment, "The sum is 7.")
    assert (end.messages, end.error, end.reward, end.terminated) == ((), None, None, True)


def test_what_was_wrong_goes_back_and_the_episode_goes_on():
    answer = step(ToolEnvironment([calculator]), ask("1 / 0") + ask("1 + 1") + '<tool_call>{"name": "calc')
    assert [message["content"] for message in answer.messages] == [
        "Error: ValueError: division by zero",
        "2",
        "Error: the call was cut off: expected </tool_call> at its end",
    ]
    assert answer.error == f"{answer.messages[0]['content']}\n{answer.messages[2]['content']}"
    assert answer.info == {"tool_calls": 3, "tool_errors": 2}
    assert not answer.terminated


def test_the_calls_of_a_turn_share_its_time():
    def sleep() -> None:
        """Sleep."""
        time.sleep(9)

    begun = time.perf_counter()
    call = '<tool_call>{"name": "sleep"}</tool_call>'
    answer = step(ToolEnvironment([sleep], tool_timeout=0.4), call * 5)
    assert [m["content"] for m in answer.messages] == ["Error: 'sleep' took longer than 0.4 seconds"] * 5
    assert time.perf_counter() - begun < 1.5


def test_tools_may_share_the_state_of_an_episode():
    class Notes(ToolEnvironment):
        def __init__(self):
            super().__init__([self.note])
            self.notes = []

        def note(self, text: str) -> int:
            """Write down a text.

            Args:
                text: The text.
            """
            self.notes.append(text)
            return len(self.notes)

    first, second = Notes(), Notes()
    call = '<tool_call>{"name": "note", "arguments": {"text": "a"}}</tool_call>'
    assert step(first, call).messages[0]["content"] == "1"
    assert step(first, call).messages[0]["content"] == "2"
    assert step(second, call).messages[0]["content"] == "1"


def test_an_unknown_format_is_refused():
    with pytest.raises(ConfigurationError, match="expected tool_format to be one of 'auto', 'hermes', .*got 'xml'"):
        ToolEnvironment([calculator], tool_format="xml")


def test_tools_are_import_paths_in_yaml():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--environment", type=Callable[[], Environment])
    text = (
        "{environment: {class_path: grpo_lightning.envs.ToolEnvironment, init_args: "
        "{tools: [grpo_lightning.envs.calculator], tool_format: pythonic}}}"
    )
    factory = parser.instantiate(parser.parse_args([f"--config={text}"])).environment
    first, second = factory(), factory()
    assert first is not second
    start = asyncio.run(first.reset(TASK))
    assert [tool["function"]["name"] for tool in start.tools] == ["calculator"]
    assert start.tool_format == "pythonic"
