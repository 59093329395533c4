"""What adapters of other libraries' environments share: text in, text out."""

import importlib
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

from grpo_lightning.envs.environment import Environment, InvalidAction
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.rollout.types import Action, Message


class TextAdapter(Environment):
    """An environment of another library that takes a move as text.

    Args:
        answer_pattern: Regular expression with one group, for example ``"<move>(.*?)</move>"``. What the group
            matches last in an answer is the move; an answer without a match is an invalid action. By default the
            whole answer is the move.
        default_move: What is said in the policy's place after an invalid action where ``episodes.invalid_action`` is
            ``"default"``: a whole answer, so ``answer_pattern`` must match it.

    Raises:
        ConfigurationError: If the pattern cannot be read, or does not match the default move.
    """

    def __init__(self, answer_pattern: str | None = None, default_move: str | None = None) -> None:
        self._pattern = None if answer_pattern is None else _compiled(answer_pattern)
        self._default_move = default_move
        if default_move is not None and self._pattern is not None and not self._pattern.search(default_move):
            raise ConfigurationError(
                f"expected default_move to be an answer that answer_pattern {answer_pattern!r} matches, but got "
                f"{default_move!r}"
            )

    def move(self, action: Action) -> str:
        """The move in an answer.

        Raises:
            InvalidAction: If the answer does not match the pattern.
        """
        if self._pattern is None:
            return action.text
        found: list[str] = self._pattern.findall(action.text)
        if not found:
            raise InvalidAction(f"Your answer has no move in it: it must match {self._pattern.pattern}")
        return found[-1]

    def default_action(self) -> str:
        """The default move.

        Raises:
            ConfigurationError: If there is none.
        """
        if self._default_move is None:
            raise ConfigurationError(
                f"expected {type(self).__name__} to have a default move, because episodes.invalid_action is "
                '"default", but got none; give it with default_move'
            )
        return self._default_move


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ConfigurationError(
            f"expected answer_pattern to be a regular expression, but got {pattern!r}: {error}"
        ) from error
    if compiled.groups != 1:
        raise ConfigurationError(
            f"expected answer_pattern to have one group, which matches the move, but {pattern!r} has "
            f"{compiled.groups}; write the others as (?:...)"
        )
    return compiled


def user_message(text: str) -> Message:
    """What an environment says, as a chat message."""
    return {"role": "user", "content": text}


def optional_package(name: str, *, adapter: str, extra: str) -> ModuleType:
    """A package that only one adapter needs.

    Raises:
        ConfigurationError: If it cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigurationError(
            f"{adapter} needs {name}: install grpo-lightning[{extra}] (importing it failed: {error})"
        ) from error


def require_one(adapter: str, **options: Any) -> None:
    """Adapters take one of several ways to name an environment.

    Raises:
        ConfigurationError: If there are several, or none.
    """
    given = [name for name, value in options.items() if value is not None]
    if len(given) != 1:
        raise ConfigurationError(
            f"expected {adapter} to have either {' or '.join(options)}, but got {' and '.join(given) or 'neither'}"
        )


def imported(argument: str, value: str | Callable[..., Any]) -> Callable[..., Any]:
    """What an import path names: on the command line a class that makes any object can be given in no other way.

    Raises:
        ConfigurationError: If it names nothing.
    """
    if not isinstance(value, str):
        return value
    module, _, name = value.rpartition(".")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(
            f"expected {argument} to be an import path like my_module.make_it, but got {value!r}: {error}"
        ) from error
    return found
