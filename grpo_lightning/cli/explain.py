"""From jsonargparse's nested reports to the one setting that is wrong, what came, and what is expected."""

import difflib
import importlib
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

_KEY = re.compile(r'Parser key "(?P<name>[^"]+)":')
_CLASS = re.compile(r"Problem with given class_path '(?P<name>[^']+)'")
_UNKNOWN_OPTION = re.compile(
    r"Option '(?P<name>[^']+)' is not accepted(?:\. Got value: Namespace\(class_path='(?P<class>[^']+)')?"
)
_NO_SUBCLASS = re.compile(r"Expected '(?P<name>[^']+)' to be a subclass of <class '(?:\w+\.)*(?P<base>\w+)'>")
_NO_ATTRIBUTE = re.compile(r"module '(?P<module>[^']+)' has no attribute '(?P<name>[^']+)'")
_NO_MODULE = re.compile(r"No module named '(?P<name>[^']+)'")
_NO_PATH = re.compile(r"(?:dot import path string: |import path or a subclass spec, but got )(?P<name>.+)")
_REQUIRED = re.compile(r"arguments are required: (?P<name>.+)")
_EXPECTED = re.compile(r"Expected a (?P<type>.+?)(?:\. Got value: (?P<value>.*))?$")
_GIVEN = re.compile(r"^Given value: (?P<value>.*)$")
_NO_CLASS = re.compile(r"Expected an instantiatable class, but (?P<name>\S+) is")
_UNKNOWN_KEY = re.compile(r"does not accept option '(?P<key>[^']+)'|unrecognized arguments: (?P<argument>\S+)")

_MAX_LINES = 5
_MAX_VALUE = 100

SettingsOf = Callable[[str], Collection[str]]
"""From a class's import path to the names of its settings."""


@dataclass(frozen=True)
class _Line:
    """One line of a report and where it stands.

    Attributes:
        text: The line without its indentation.
        keys: The settings around it, from the outermost.
        class_path: The class around it; empty without one.
    """

    text: str
    keys: tuple[str, ...]
    class_path: str

    @property
    def key(self) -> str:
        return ".".join(self.keys)


def explain(report: str, keys: Collection[str], settings_of: SettingsOf) -> str:
    """What is wrong, in at most five lines.

    Args:
        report: Message of the parser's error.
        keys: Settings that the command knows, by full path.
        settings_of: Settings of a class.
    """
    lines = list(_lines(report))
    for pattern in (_UNKNOWN_OPTION, _NO_ATTRIBUTE, _NO_MODULE, _NO_PATH, _NO_CLASS, _NO_SUBCLASS, _REQUIRED):
        for line in lines:
            match = pattern.search(line.text)
            if match is not None:
                return _explain_line(pattern, match, line, settings_of)
    unknown = _UNKNOWN_KEY.search(report)
    if unknown is not None:
        return _unknown_key((unknown["key"] or unknown["argument"]), keys)
    return _wrong_value(lines) or "\n".join(line.rstrip() for line in report.splitlines()[:_MAX_LINES])


def _lines(report: str) -> Iterator[_Line]:
    around: list[tuple[int, re.Pattern[str], str]] = []
    for raw in report.splitlines():
        text = raw.lstrip(" -")
        indent = len(raw) - len(text)
        if not text:
            continue
        around = [entry for entry in around if entry[0] < indent]
        for pattern in (_KEY, _CLASS):
            match = pattern.match(text)
            if match is not None:
                around.append((indent, pattern, match["name"]))
        yield _Line(
            text,
            tuple(name for _, pattern, name in around if pattern is _KEY),
            next((name for _, pattern, name in reversed(around) if pattern is _CLASS), ""),
        )


def _explain_line(pattern: re.Pattern[str], match: re.Match[str], line: _Line, settings_of: SettingsOf) -> str:
    name = match["name"].strip("[]'\"")
    if pattern is _UNKNOWN_OPTION:
        # Of a class that makes the value of a setting, the report says so only here.
        owner = match["class"] or line.class_path
        near = _nearest(name.split(".")[0], settings_of(owner))
        return _suggest(f"there is no setting {line.key}.{name}", near and f"{line.key}.{near}", f"{owner} has none")
    if pattern is _NO_SUBCLASS:
        return f"{line.key}: expected a subclass of {match['base']}, but got {name}"
    if pattern is _NO_ATTRIBUTE:
        module = match["module"]
        near = _nearest(name, dir(importlib.import_module(module)))
        return _suggest(f"{line.key}: there is no {name} in {module}", near and f"{module}.{near}")
    if pattern is _NO_MODULE:
        return f"{line.key}: there is no module {name!r} to import from; is it installed, and on the Python path?"
    if pattern is _NO_PATH:
        near = _nearest(name, _known_classes())
        return _suggest(
            f"{line.key}: expected an import path (package.module.name), but got {name!r}",
            near and _known_classes()[near],
        )
    if pattern is _NO_CLASS:
        return f"{line.key}: expected a class, by import path, before its settings; {name} is only its description"
    missing = [f"{line.key}.{part.strip()}" for part in name.split(",")]
    return f"missing {', '.join(missing)}; set them in a configuration file (-c) or as --{missing[0]} VALUE"


def _known_classes() -> dict[str, str]:
    """The classes and functions of this package that settings name, with their import paths."""
    homes = ("grpo_lightning", "grpo_lightning.tasks", "grpo_lightning.rewards", "grpo_lightning.callbacks")
    return {name: f"{home}.{name}" for home in homes for name in importlib.import_module(home).__all__}


def _unknown_key(given: str, keys: Collection[str]) -> str:
    if given.startswith("-") or "." in given:
        key = given.lstrip("-").partition("=")[0]
        return _suggest(f"there is no setting {key}", _nearest(key, keys))
    if given in keys:
        return f"expected --{given}, but got {given!r}"
    return f"unexpected argument {given!r}; settings are given as --name value"


def _wrong_value(lines: list[_Line]) -> str | None:
    found = [(line, match) for line in lines if (match := _EXPECTED.search(line.text)) is not None]
    if not found:
        return None
    # An outer setting that may be null reports that too; the mistake is in the innermost one.
    key = max((line.keys for line, _ in found), key=len)
    types = list(dict.fromkeys(_readable(match["type"]) for line, match in found if line.keys == key))
    values = [match["value"] for line, match in found if line.keys == key and match["value"] is not None]
    values += [given["value"] for line in lines if line.keys == key and (given := _GIVEN.match(line.text)) is not None]
    value = values[0] if values else "?"
    shown = value if len(value) <= _MAX_VALUE else value[:_MAX_VALUE] + " ..."
    return f"{'.'.join(key)}: expected {' or '.join(types)}, but got {shown!r}"


def _readable(type_name: str) -> str:
    if type_name.startswith("typing.Literal["):
        return "one of " + type_name.removeprefix("typing.Literal[").removesuffix("]")
    plain = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", type_name)
    return "null" if plain == "NoneType" else plain


def _nearest(name: str, known: Collection[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, known, n=1)), None)


def _suggest(problem: str, suggestion: str | None, otherwise: str = "") -> str:
    if suggestion is not None:
        return f"{problem}; did you mean {suggestion}?"
    return f"{problem}; {otherwise}" if otherwise else problem
