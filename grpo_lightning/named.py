"""Functions that settings name: one of ours by its name, a user's by its import path."""

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

from grpo_lightning.errors import ConfigurationError

F = TypeVar("F", bound=Callable[..., Any])


def one_of(setting: str, value: str, known: Mapping[str, F]) -> F:
    """The function of ours that a setting names.

    Args:
        setting: Name of the setting, for messages.
        value: A name in ``known``.
        known: Our functions by name.

    Raises:
        ConfigurationError: If there is none of that name.
    """
    if value not in known:
        raise ConfigurationError(_unknown(setting, value, known, ""))
    return known[value]


def named(setting: str, value: str | F, known: Mapping[str, F]) -> F:
    """The function that a setting means, which may be a user's.

    Args:
        setting: Name of the setting, for messages.
        value: A name in ``known``, an import path, or the function itself.
        known: Our functions by name.

    Raises:
        ConfigurationError: If there is none.
    """
    if callable(value):
        return value
    if value in known:
        return known[value]
    module, _, name = value.rpartition(".")
    if not module:
        raise ConfigurationError(_unknown(setting, value, known, ", or the import path of a function"))
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"{setting}={value!r} cannot be imported: {error}") from error
    if not callable(found):
        raise ConfigurationError(f"expected {setting}={value!r} to be a function, but it is {type(found).__name__}")
    return found  # type: ignore[no-any-return]


def _unknown(setting: str, value: object, known: Mapping[str, Any], further: str) -> str:
    near = difflib.get_close_matches(str(value), known, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return (
        f"expected {setting} to be one of {', '.join(known)}{further}, but got {value!r}; {hint}docs/algorithms.md "
        "shows them all"
    )


def name_of(value: str | Callable[..., Any] | None) -> str | None:
    """What a setting that means a function is written down as: its name, or the function's import path."""
    if value is None or isinstance(value, str):
        return value
    return f"{getattr(value, '__module__', '?')}.{getattr(value, '__qualname__', repr(value))}"


def configured(setting: str, function: F, settings: Mapping[str, Any], *example: Any) -> F:
    """A function with its settings, tried on an example so that what it refuses is refused early.

    Args:
        setting: Name of the setting that named it, for messages.
        function: A function with keyword-only settings.
        settings: The settings.
        example: Arguments that every such function takes.

    Raises:
        ConfigurationError: If it has no such setting, lacks one, or refuses a value.
    """
    parameters = inspect.signature(function).parameters.values()
    own = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    name = getattr(function, "__name__", repr(function))
    unknown = [] if open_ended else [key for key in settings if key not in own]
    if unknown:
        raise ConfigurationError(
            f"{setting} {name!r} has no setting {', '.join(map(repr, unknown))}; it has {', '.join(own) or 'none'}"
        )
    bound = partial(function, **settings)
    try:
        bound(*example)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"{setting} {name!r} cannot be used with {dict(settings)}: {error}") from error
    return bound  # type: ignore[return-value]
