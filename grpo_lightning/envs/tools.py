"""Python functions as tools that a policy can call."""

import asyncio
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grpo_lightning import threads
from grpo_lightning.envs.arguments import ArgumentError, checked_arguments
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.rollout.types import ToolCall

_LONGEST_ERROR = 500
"""Characters of a tool's error that the policy is told."""


@dataclass(frozen=True)
class ToolResult:
    """What a call of a tool came to.

    Attributes:
        content: The result as text, or what was wrong.
        error: Whether something was wrong.
    """

    content: str
    error: bool = False


def tool_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """JSON schema of a tool in the OpenAI shape, from its type hints and its docstring.

    Args:
        function: A function or method, plain or async, with type hints and a docstring that describes each parameter
            under ``Args:``.

    Raises:
        ConfigurationError: Naming the function and what it lacks.
    """
    if not inspect.isroutine(function):
        raise ConfigurationError(f"expected a tool to be a function or a method, but got {function!r}")
    name = function.__name__
    if not name.isidentifier():
        raise ConfigurationError(f"expected a tool with a name, but got {name}: define it with def")
    parameters = inspect.signature(function).parameters.values()
    for parameter in parameters:
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ConfigurationError(
                f"tool {name!r}: expected parameters that are given by name, but got {str(parameter)!r}"
            )
    missing = [parameter.name for parameter in parameters if parameter.annotation is parameter.empty]
    if missing:
        raise ConfigurationError(
            f"tool {name!r}: expected a type hint for each parameter, but {', '.join(map(repr, missing))} has none"
        )
    if not inspect.getdoc(function):
        raise ConfigurationError(
            f"tool {name!r}: expected a docstring, but there is none; say what the tool does, and describe each "
            "parameter under 'Args:'"
        )
    return _schema(function)


def _schema(function: Callable[..., Any]) -> dict[str, Any]:
    from transformers.utils.chat_template_utils import (
        DocstringParsingException,
        TypeHintParsingException,
        get_json_schema,
    )

    try:
        schema: dict[str, Any] = get_json_schema(function)
    except (DocstringParsingException, TypeHintParsingException, NameError, ValueError) as error:
        raise ConfigurationError(
            f"tool {function.__name__!r}: expected type hints of plain values, and a docstring that describes each "
            f"parameter under 'Args:', but transformers says: {error}"
        ) from error
    return schema


@dataclass(frozen=True)
class _Tool:
    function: Callable[..., Any]
    schema: Mapping[str, Any]


class ToolSet:
    """Tools by name, and how they are called. What the policy did wrong is a result with an error, no exception.

    Args:
        functions: The tools; plain ones run in a thread, so they may block. An async one that never awaits cannot be
            stopped by the time limit.
        timeout: Seconds that one call may take.
        max_result_length: Longest result in characters; a longer one is cut.

    Raises:
        ConfigurationError: If there is none, two have the same name, or one lacks type hints or docstring.
    """

    def __init__(
        self, functions: Sequence[Callable[..., Any]], *, timeout: float = 10.0, max_result_length: int = 2000
    ) -> None:
        if not functions:
            raise ConfigurationError("expected at least one tool, but got none")
        for name, value in (("timeout", timeout), ("max_result_length", max_result_length)):
            if not value > 0:
                raise ConfigurationError(f"expected a tool's {name} > 0, but got {value}")
        self._tools: dict[str, _Tool] = {}
        for function in functions:
            schema = tool_schema(function)
            name = schema["function"]["name"]
            if name in self._tools:
                raise ConfigurationError(f"expected tools with different names, but two are named {name!r}")
            self._tools[name] = _Tool(function, schema)
        self._timeout = timeout
        self._max_result_length = max_result_length

    @property
    def schemas(self) -> tuple[Mapping[str, Any], ...]:
        """JSON schema of each tool, in the OpenAI shape."""
        return tuple(tool.schema for tool in self._tools.values())

    async def call(self, call: ToolCall, *, timeout: float | None = None) -> ToolResult:
        """Run a call.

        Args:
            call: The call, readable or not.
            timeout: Seconds that it may take, if less than usual.
        """
        if call.error is not None:
            return _wrong(call.error)
        tool = self._tools.get(call.name)
        if tool is None:
            return _wrong(f"there is no tool {call.name[:100]!r}; the tools are {', '.join(map(repr, self._tools))}")
        try:
            arguments = checked_arguments(tool.schema["function"]["parameters"], call.arguments)
        except ArgumentError as error:
            return _wrong(str(error))
        seconds = self._timeout if timeout is None else min(timeout, self._timeout)
        limit = asyncio.timeout(seconds)
        try:
            async with limit:
                result = await threads.call(tool.function, **arguments)
            return ToolResult(self._cut(_as_text(result)))
        except Exception as error:
            if limit.expired():
                return _wrong(f"{call.name!r} took longer than {self._timeout:g} seconds")
            return _wrong(threads.described(error))

    def _cut(self, text: str) -> str:
        limit = self._max_result_length
        return text if len(text) <= limit else f"{text[:limit]}\n(cut after {limit} of {len(text)} characters)"


def _wrong(message: str) -> ToolResult:
    return ToolResult(f"Error: {_valid(message)[:_LONGEST_ERROR]}", error=True)


def _as_text(result: Any) -> str:
    return _valid(result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str))


def _valid(text: str) -> str:
    # Half of a surrogate pair would fail in the tokenizer.
    return text.encode("utf-8", "replace").decode("utf-8")
