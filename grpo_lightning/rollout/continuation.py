"""What a chat template puts between two turns of the assistant, without showing it what the policy said.

What was sampled is never encoded anew: text does not lead back to the same tokens. A conversation of dummies is shown
to the template instead, whose assistant says a *sentinel*; what stands behind the sentinel is what to append.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any, Literal

from grpo_lightning.errors import ConfigurationError
from grpo_lightning.rollout.chat_template import ANY_USER, ChatTemplate, TemplateRefusal, Tools, shared
from grpo_lightning.rollout.types import Message

CALL_ID = "call12345"
"""Id of a dummy tool call; nine letters and digits, because some templates insist on it."""

_NEWS = "News7f3a"
_MARK = "7f3a"
_END_OF_THINKING = "\n</think>\n\n"


@dataclass(frozen=True)
class Continuation:
    """The tokens between the end of one turn of the assistant and the beginning of the next.

    Attributes:
        close: What ends the turn, as far as the completion lacks it; the system says it in the policy's place.
        observation: Separator, the new messages, and the generation prompt.
    """

    close: tuple[int, ...]
    observation: tuple[int, ...]


@dataclass(frozen=True)
class Suffix:
    """A continuation as text.

    Attributes:
        close: What ends the assistant's turn; empty if the template has nothing for it.
        rest: What follows.
        opens: Whether ``close`` rather begins the next message: there are templates in which the policy ends its turn
            with the token that stands before a message of the user.
    """

    close: str
    rest: str
    opens: bool = False


@dataclass(frozen=True)
class Technique:
    """How the suffix is got for messages of a role.

    Attributes:
        kind: Cut behind the sentinel, or behind the text that comes out without the new messages.
        shape: Which dummy the assistant says.
        token: Text of the token that ends the assistant's turn, where one stands behind the sentinel.
        opens: See `Suffix`.
    """

    kind: Literal["sentinel", "prefix"]
    shape: str
    token: str | None
    opens: bool


class TurnRenderer:
    """Suffixes of a chat template. How to get them is found out once for every role.

    Args:
        template: The chat template.
        stop_texts: Texts of the tokens that end a completion.
        special_texts: Texts of the tokenizer's special tokens.
    """

    def __init__(self, template: ChatTemplate, stop_texts: Iterable[str], special_texts: Iterable[str]) -> None:
        self._template = template
        self._token_texts = (tuple(stop_texts), tuple(special_texts))
        self._techniques: dict[tuple[str, bool], Technique] = {}

    def suffix(self, messages: Sequence[Message], tools: Tools = ()) -> Suffix:
        """What stands behind the assistant's turn when these messages follow it.

        Raises:
            ConfigurationError: If the template refuses them, or neither technique works with it.
        """
        technique = self.technique(str(messages[0]["role"]) if messages else "user", tools)
        found = self._apply(technique, messages, tools)
        if found is None:
            raise self._unusable(str(messages[0]["role"]))
        return found

    def answer(self, text: str) -> str:
        """An answer as the template shows it behind the generation prompt, up to the end of the turn."""
        opening, close = self._answer_frame
        return opening + text + close

    @cached_property
    def _answer_frame(self) -> tuple[str, str]:
        suffix = self.suffix([dummy_message("user", _NEWS)])
        sentinels = _Sentinels(_MARK)
        answer = _assistant("content", (), (), sentinels)
        shown = self._template.render([ANY_USER, answer], generation_prompt=False).partition(sentinels.content)[0]
        prompt = self._template.render([ANY_USER])
        if shown.startswith(prompt):
            opening = shown[len(prompt) :]
        else:
            opening = _END_OF_THINKING if prompt.rstrip().endswith("<think>") else ""
        return opening, "" if suffix.opens else suffix.close

    def answer_before(self, message: Message, tools: Tools = ()) -> Message:
        """A dummy of the assistant's message that such a message answers: a call of the tool, where it is a result."""
        shape = self.technique(str(message["role"]), tools).shape
        return _assistant(shape, [message], tools, _Sentinels.unlike([message]))

    def technique(self, role: str, tools: Tools = ()) -> Technique:
        """How the suffix is got for messages of a role.

        Raises:
            ConfigurationError: If the template refuses the role, or neither technique works with it.
        """
        key = (role, bool(tools))
        if key not in self._techniques:
            self._techniques[key] = self._probe(dummy_message(role, _NEWS, tools), tools)
        return self._techniques[key]

    def _unusable(self, role: str, reason: object = None) -> ConfigurationError:
        return ConfigurationError(
            f"expected a chat template that shows messages of the role {role!r} behind an answer of the assistant, but "
            f"that of {self._template.name} does not"
            + (f": {reason}" if reason else "")
            + ". Give another with chat_template=FILE, or have the environment use another role"
        )

    def _probe(self, message: Message, tools: Tools) -> Technique:
        refusal: TemplateRefusal | None = None
        for kind in ("sentinel", "prefix"):
            for shape in _SHAPES if message["role"] == "tool" else ("content",):
                try:
                    technique = self._technique_of(kind, shape, message, tools)
                except TemplateRefusal as error:
                    refusal = refusal or error
                    continue
                if technique is not None:
                    return technique
        raise self._unusable(str(message["role"]), refusal)

    def _technique_of(
        self, kind: Literal["sentinel", "prefix"], shape: str, message: Message, tools: Tools
    ) -> Technique | None:
        if kind == "prefix":
            technique = Technique(kind, shape, None, False)
            found = self._apply(technique, [message], tools)
            return technique if found is not None and _NEWS in found.rest else None
        behind = self._behind_sentinel(shape, [message], tools)
        if behind is None or _NEWS not in behind.text:
            return None
        gap = behind.text.partition(_NEWS)[0]
        token = self._first_token(gap, self._end_of_answer(tools) if behind.in_call else None)
        if token is None:
            return None if behind.in_call else Technique(kind, shape, None, False)
        end = gap[: gap.index(token) + len(token)]
        return Technique(kind, shape, token, opens=not self._ends_last_turn(end, shape, message, tools))

    def end_of_last_answer(self) -> str:
        """The stop token, or else the first special one, behind an answer that nothing follows; empty without one.

        Some templates leave the last answer open; the end that they show before a further question counts then.
        """
        sentinels = _Sentinels(_MARK)
        try:
            text = self._template.render(
                [ANY_USER, {"role": "assistant", "content": sentinels.content}], generation_prompt=False
            )
        except TemplateRefusal:
            return ""
        behind = sentinels.cut(text)
        if behind is not None and (token := self._first_token(behind.text, None)):
            return token
        try:
            technique = self.technique("user")
        except ConfigurationError:
            return ""
        return "" if technique.opens else technique.token or ""

    def _end_of_answer(self, tools: Tools) -> str | None:
        try:
            return self.technique("user", tools).token
        except ConfigurationError:
            return None

    def _first_token(self, text: str, usual: str | None) -> str | None:
        """The first stop token in a text; else what usually ends an answer; else the first special token."""
        stop, special = self._token_texts
        for texts in (stop, (usual or "",), special):
            found = [(text.index(token), -len(token), token) for token in texts if token and token in text]
            if found:
                return min(found)[2]
        return None

    def _ends_last_turn(self, end: str, shape: str, message: Message, tools: Tools) -> bool:
        """Whether an answer ends like this also where no message follows it."""
        try:
            text = self._template.render([ANY_USER, _assistant(shape, [message], tools, _Sentinels(_MARK))], tools)
        except TemplateRefusal:
            return True
        behind = _Sentinels(_MARK).cut(text)
        return behind is not None and behind.text.removesuffix(self._template.generation_prompt).startswith(end)

    def _behind_sentinel(self, shape: str, messages: Sequence[Message], tools: Tools) -> "_Behind | None":
        sentinels = _Sentinels.unlike(messages)
        text = self._template.render([ANY_USER, _assistant(shape, messages, tools, sentinels), *messages], tools)
        return sentinels.cut(text)

    def _apply(self, technique: Technique, messages: Sequence[Message], tools: Tools) -> Suffix | None:
        if technique.kind == "prefix":
            return self._prefix_diff(technique, messages, tools)
        behind = self._behind_sentinel(technique.shape, messages, tools)
        if behind is None:
            return None
        if technique.token is None:
            return Suffix("", behind.text)
        before, token, rest = behind.text.partition(technique.token)
        if not token:
            return None
        return Suffix(token if behind.in_call else before + token, rest, technique.opens)

    def _prefix_diff(self, technique: Technique, messages: Sequence[Message], tools: Tools) -> Suffix | None:
        sentinels = _Sentinels.unlike(messages)
        said, other = (_assistant(technique.shape, messages, tools, s) for s in (sentinels, sentinels.reversed()))
        without = self._template.render([ANY_USER, said], tools, generation_prompt=False)
        without_other = self._template.render([ANY_USER, other], tools, generation_prompt=False)
        whole = self._template.render([ANY_USER, said, *messages], tools)
        if without == without_other or not whole.startswith(without):
            return None
        end = shared(without[::-1], without_other[::-1])[::-1]
        token = self._first_token(end, None)
        if token is None:
            return None if "tool_calls" in said else Suffix("", end + whole[len(without) :])
        before, token, separator = end.partition(token)
        return Suffix(token if "tool_calls" in said else before + token, separator + whole[len(without) :])


@dataclass(frozen=True)
class _Behind:
    """Text behind the last sentinel, and whether that was the argument of a tool call, whose own end comes first."""

    text: str
    in_call: bool


@dataclass(frozen=True)
class _Sentinels:
    """Words that are nowhere else in the conversation."""

    mark: str

    @classmethod
    def unlike(cls, messages: Sequence[Message]) -> "_Sentinels":
        """Sentinels that do not occur in these messages."""
        text, mark = repr(messages), _MARK
        while mark in text:
            mark += "b"
        return cls(mark)

    def reversed(self) -> "_Sentinels":
        """Others, with another end."""
        return _Sentinels(self.mark[::-1])

    @property
    def content(self) -> str:
        return f"Said{self.mark}"

    @property
    def argument(self) -> str:
        return f"Argument{self.mark}"

    def cut(self, text: str) -> _Behind | None:
        said, called = text.rfind(self.content), text.rfind(self.argument)
        if max(said, called) < 0:
            return None
        if called > said:
            return _Behind(text[called + len(self.argument) :], in_call=True)
        return _Behind(text[said + len(self.content) :], in_call=False)


_SHAPES = ("call", "call_json", "silent_call", "silent_call_json", "content")
"""What an assistant whose tools have answered may look like: templates want a call's arguments as a mapping or as JSON,
and some take no content beside calls."""


def _assistant(shape: str, messages: Sequence[Message], tools: Tools, sentinels: _Sentinels) -> dict[str, Any]:
    said: dict[str, Any] = {"role": "assistant", "content": "" if "silent" in shape else sentinels.content}
    results = list(takewhile(lambda m: m["role"] == "tool", messages))
    if shape == "content" or not results:
        return said
    arguments: Any = {"value": sentinels.argument}
    if shape.endswith("json"):
        arguments = json.dumps(arguments)
    return {**said, "tool_calls": list(_calls(results, arguments, tools))}


def _calls(results: Sequence[Message], arguments: Any, tools: Tools) -> Iterator[dict[str, Any]]:
    for result in results:
        name = result.get("name") or tool_name(tools)
        call_id = result.get("tool_call_id") or CALL_ID
        yield {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def tool_name(tools: Tools) -> str:
    """Name of the first tool, or a made-up one."""
    first: Mapping[str, Any] = tools[0] if tools else {}
    return str(first.get("function", first).get("name") or "tool")


def dummy_message(role: str, content: str, tools: Tools = ()) -> Message:
    """A message as an environment would send it."""
    if role != "tool":
        return {"role": role, "content": content}
    return {"role": role, "content": content, "name": tool_name(tools), "tool_call_id": CALL_ID}
