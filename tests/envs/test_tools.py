import asyncio
import functools
import json
import subprocess
import sys
import time
from typing import Any, Literal

import pytest

from grpo_lightning.envs import ToolSet, tool_schema
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.rollout.types import ToolCall


def add(a: int, b: int = 1) -> int:
    """Add two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b


def kinds(
    whole: int | None = None,
    number: float = 0.0,
    text: str = "",
    flag: bool = False,
    several: list[int] | None = None,
    mapped: dict[str, float] | None = None,
    color: Literal["red", "blue"] = "red",
    level: Literal[1, 2] = 1,
    either: int | str = 0,
    point: tuple[int, str] = (0, ""),
    mixed: list[int] | str = "",
    anything: Any = None,
) -> str:
    """Say what was given.

    Args:
        whole: A number.
        number: A number.
        text: A text.
        flag: A flag.
        several: Numbers.
        mapped: Numbers by name.
        color: A color.
        level: A level.
        either: A number or a text.
        point: A place.
        mixed: Numbers or a text.
        anything: Anything.
    """
    values = [whole, number, text, flag, several, mapped, color, level, either, point, mixed, anything]
    return repr(values)


def call(functions, name, arguments=None, **settings):
    async def run():
        return await ToolSet(functions, **settings).call(ToolCall(name, arguments or {}))

    return asyncio.run(run())


def returning(value):
    def tool() -> Any:
        """Return it."""
        return value

    return tool


def given(**arguments):
    """What the tool gets, or the error."""
    (name,) = arguments
    seen = []

    @functools.wraps(kinds)
    def wrapper(**values):
        seen.append(values[name])

    result = call([wrapper], "kinds", arguments)
    return result.content if result.error else seen[0]


def test_schema():
    assert tool_schema(add)["function"] == {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "description": "The first."},
                "b": {"type": "integer", "description": "The second."},
            },
            "required": ["a"],
        },
        "return": {"type": "integer"},
    }


def no_hint(a, b: int):
    """Do.

    Args:
        a: It.
        b: It.
    """


def no_docstring(a: int):
    return a


def undescribed(a: int) -> int:
    """Do."""
    return a


def variadic(*a: int) -> int:
    """Do."""
    return len(a)


def positional(a: int, /) -> int:
    """Do."""
    return a


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (no_hint, "tool 'no_hint': expected a type hint for each parameter, but 'a' has none"),
        (no_docstring, "tool 'no_docstring': expected a docstring, but there is none; say what the tool does"),
        (undescribed, "tool 'undescribed'.*the docstring has no description for the argument 'a'"),
        (variadic, r"tool 'variadic': expected parameters that are given by name, but got '\*a: int'"),
        (positional, "tool 'positional': expected parameters that are given by name, but got 'a: int'"),
        (lambda: 1, "expected a tool with a name, but got <lambda>: define it with def"),
        (functools.partial(add, 1), r"expected a tool to be a function or a method, but got functools.partial"),
    ],
)
def test_a_function_that_is_no_tool_is_refused(function, message):
    with pytest.raises(ConfigurationError, match=message):
        tool_schema(function)


def test_sets_that_cannot_work_are_refused():
    with pytest.raises(ConfigurationError, match="expected at least one tool, but got none"):
        ToolSet([])
    with pytest.raises(ConfigurationError, match="expected tools with different names, but two are named 'add'"):
        ToolSet([add, add])
    with pytest.raises(ConfigurationError, match="expected a tool's timeout > 0, but got 0"):
        ToolSet([add], timeout=0)
    with pytest.raises(ConfigurationError, match="expected a tool's max_result_length > 0, but got -1"):
        ToolSet([add], max_result_length=-1)


def test_calls():
    assert call([add], "add", {"a": 1, "b": 2}).content == "3"
    assert call([add], "add", {"a": 1}).content == "2"
    assert not call([add], "add", {"a": 1}).error


def test_a_method_and_an_async_tool():
    class Stack:
        def __init__(self):
            self.items = []

        def push(self, item: str) -> int:
            """Push an item.

            Args:
                item: The item.
            """
            self.items.append(item)
            return len(self.items)

    async def wait() -> str:
        """Wait."""
        await asyncio.sleep(0.01)
        return "done"

    stack = Stack()
    assert call([stack.push, wait], "push", {"item": "a"}).content == "1"
    assert stack.items == ["a"]
    assert call([stack.push, wait], "wait").content == "done"


def test_parameters_may_have_any_name():
    def tool(function: str, call: str, name: str) -> str:
        """Join.

        Args:
            function: A text.
            call: A text.
            name: A text.
        """
        return function + call + name

    assert call([tool], "tool", {"function": "a", "call": "b", "name": "c"}).content == "abc"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "wrong arguments: 'a' is missing; the arguments are 'a', 'b'"),
        ({"a": 1, "c": 2, "d": 3}, "wrong arguments: there is no 'c', there is no 'd'; the arguments are 'a', 'b'"),
        ({"b": 1, "c": 2}, "wrong arguments: 'a' is missing, there is no 'c'; the arguments are 'a', 'b'"),
        ({"a": "x"}, 'wrong arguments: expected a to be an integer, but got "x"'),
        ({"a": None}, "wrong arguments: expected a to be an integer, but got null"),
    ],
)
def test_wrong_arguments(arguments, message):
    result = call([add], "add", arguments)
    assert (result.content, result.error) == (f"Error: {message}", True)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("whole", 3, 3),
        ("whole", 3.0, 3),
        ("whole", "3", 3),
        ("whole", None, None),
        ("whole", "null", None),
        ("number", 3, 3.0),
        ("number", "1e3", 1000.0),
        ("text", "3", "3"),
        ("text", "", ""),
        ("flag", True, True),
        ("flag", "false", False),
        ("several", [1, 2.0, "3"], [1, 2, 3]),
        ("several", "[1, 2]", [1, 2]),
        ("several", None, None),
        ("mapped", {"x": 1}, {"x": 1.0}),
        ("mapped", '{"x": 1}', {"x": 1.0}),
        ("color", "blue", "blue"),
        ("level", 2.0, 2),
        ("level", "2", 2),
        ("either", "3", "3"),
        ("either", 3, 3),
        ("point", [1, "a"], [1, "a"]),
        ("mixed", [1], [1]),
        ("mixed", "[1]", "[1]"),
        ("anything", {"a": [None]}, {"a": [None]}),
    ],
)
def test_values_that_fit(name, value, expected):
    got = given(**{name: value})
    assert got == expected
    assert type(got) is type(expected)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("whole", 3.5, "expected whole to be an integer, but got 3.5"),
        ("whole", True, "expected whole to be an integer, but got true"),
        ("whole", "three", 'expected whole to be an integer, but got "three"'),
        ("whole", "3.5", "expected whole to be an integer, but got 3.5"),
        ("number", True, "expected number to be a number, but got true"),
        ("number", None, "expected number to be a number, but got null"),
        ("number", 10**400, f"expected number to be a number that is not so large, but got 1{'0' * 99}"),
        ("text", 3, "expected text to be a string, but got 3"),
        ("flag", 1, "expected flag to be true or false, but got 1"),
        ("several", [1, "x"], 'expected several[1] to be an integer, but got "x"'),
        ("several", {"a": 1}, 'expected several to be a list, but got {"a": 1}'),
        ("mapped", {"x": "y"}, "expected mapped['x'] to be a number, but got \"y\""),
        ("mapped", [1], "expected mapped to be an object, but got [1]"),
        ("color", "green", 'expected color to be one of "red", "blue", but got "green"'),
        ("level", 3, "expected level to be one of 1, 2, but got 3"),
        ("level", True, "expected level to be an integer, but got true"),
        ("either", True, "expected either to be an integer or a string, but got true"),
        ("point", [1], "expected point to be a list of 2 values, but got [1]"),
        ("mixed", 3, "expected mixed to be one of several types, but got 3"),
    ],
)
def test_values_that_do_not_fit(name, value, message):
    assert given(**{name: value}) == f"Error: wrong arguments: {message}"


def test_unknown_tool_and_unreadable_call():
    result = call([add], "sub")
    assert (result.content, result.error) == ("Error: there is no tool 'sub'; the tools are 'add'", True)
    broken = asyncio.run(ToolSet([add]).call(ToolCall("add", error="the call was cut off")))
    assert (broken.content, broken.error) == ("Error: the call was cut off", True)


def test_a_tool_that_raises_is_told():
    def fail() -> int:
        """Fail."""
        raise KeyError("x" * 10_000)

    async def leave() -> int:
        """Leave."""
        sys.exit("bye")

    result = call([fail], "fail")
    assert result.error
    assert result.content.startswith("Error: KeyError: 'xxx")
    assert len(result.content) < 600
    assert call([leave], "leave").content == "Error: SystemExit: bye"


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_a_tool_that_hangs_runs_out_of_time(kind):
    def plain() -> None:
        """Hang."""
        time.sleep(5)

    async def waiting() -> None:
        """Hang."""
        await asyncio.sleep(5)

    tool = {"plain": plain, "async": waiting}[kind]
    begun = time.perf_counter()
    result = call([tool], tool.__name__, timeout=0.05)
    assert (result.content, result.error) == (f"Error: {tool.__name__!r} took longer than 0.05 seconds", True)
    assert time.perf_counter() - begun < 2


def test_a_call_may_get_less_time_but_not_more():
    async def wait() -> str:
        """Wait."""
        await asyncio.sleep(0.2)
        return "done"

    tools = ToolSet([wait], timeout=0.05)
    assert asyncio.run(tools.call(ToolCall("wait"), timeout=9)).error
    patient = ToolSet([wait], timeout=9)
    assert asyncio.run(patient.call(ToolCall("wait"), timeout=0.05)).error
    assert asyncio.run(patient.call(ToolCall("wait"))).content == "done"


def test_a_tools_own_time_out_is_its_error():
    async def asking() -> None:
        """Ask."""
        raise TimeoutError("the server is silent")

    assert call([asking], "asking").content == "Error: TimeoutError: the server is silent"


@pytest.mark.parametrize(
    ("value", "content"),
    [
        ("as it is", "as it is"),
        (7, "7"),
        (None, "null"),
        ({"town": "Zürich", "at": [1, 2]}, '{"town": "Zürich", "at": [1, 2]}'),
        (2 + 3j, '"(2+3j)"'),
        ("half \ud800", "half ?"),
    ],
)
def test_results_as_text(value, content):
    result = call([returning(value)], "tool")
    assert (result.content, result.error) == (content, False)


def test_a_result_that_contains_itself_is_an_error():
    circle = []
    circle.append(circle)
    assert call([returning(circle)], "tool").content == "Error: ValueError: Circular reference detected"


def test_long_results_are_cut():
    assert call([returning("x" * 100)], "tool", max_result_length=100).content == "x" * 100
    cut = call([returning("x" * 101)], "tool", max_result_length=100).content
    assert cut == "x" * 100 + "\n(cut after 100 of 101 characters)"


def test_schemas_are_json():
    schemas = ToolSet([add, kinds]).schemas
    assert [schema["function"]["name"] for schema in json.loads(json.dumps(schemas))] == ["add", "kinds"]


def test_import_is_light():
    code = "import sys, grpo_lightning.envs; print({'torch', 'transformers', 'lightning', 'vllm'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
