"""A model's chat template: messages to text, and what it does with tools and with earlier thinking."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any

from grpo_lightning.errors import ConfigurationError
from grpo_lightning.rollout.types import Message

Tools = Sequence[Mapping[str, Any]]
"""JSON schemas of tools, in the OpenAI shape."""

_SET_HERE = {"messages", "add_generation_prompt", "tools"}
"""Template variables that are no settings."""

ANY_USER: Message = {"role": "user", "content": "Question7f3a"}
"""Stands for a question where only the form matters."""


class TemplateRefusal(ConfigurationError):
    """The chat template cannot show these messages."""


@dataclass(frozen=True)
class TemplateFacts:
    """What a chat template does.

    Attributes:
        name: File or model that it comes from.
        renderings: One conversation, shown several times.
        asks: Whether it knows ``add_generation_prompt``.
        generation_prompt: What it puts behind a question to have it answered.
        end: Text of the special token with which an answer ends; empty if it ends without one.
        end_id: Id of that token; None without one.
        stops: Texts that end a completion: those of the stop tokens, and those of the settings.
    """

    name: str
    renderings: Sequence[str]
    asks: bool
    generation_prompt: str
    end: str
    end_id: int | None
    stops: Sequence[str]

    @property
    def end_stops(self) -> bool:
        """Whether a completion is over where the template says that the answer is."""
        return not self.end or any(stop in self.end or self.end in stop for stop in self.stops)


class ChatTemplate:
    """A Jinja chat template with the arguments that it gets.

    Args:
        tokenizer: The model's tokenizer, whose special tokens the template may name.
        text: The template.
        name: File or model that it comes from, for messages.
        arguments: Further variables.

    Raises:
        ConfigurationError: If the template does not know one of its arguments.
    """

    def __init__(self, tokenizer: Any, text: str, name: str, arguments: Mapping[str, Any]) -> None:
        from transformers.utils.chat_template_utils import _get_template_variables

        self.text = text
        self.name = name
        self._tokenizer = tokenizer
        self._arguments = dict(arguments)
        known = _get_template_variables(text) - _SET_HERE - set(tokenizer.special_tokens_map)
        known -= {"raise_exception", "strftime_now"}
        unknown = sorted(set(arguments) - known)
        if unknown:
            raise ConfigurationError(
                f"the chat template of {name} does not use {', '.join(map(repr, unknown))} "
                f"(chat_template_args); it knows {', '.join(sorted(known)) or 'no arguments'}"
            )

    def render(self, messages: Sequence[Message], tools: Tools = (), *, generation_prompt: bool = True) -> str:
        """The conversation as text, special tokens included.

        Args:
            messages: The conversation, at least one message.
            tools: Tools that may be called.
            generation_prompt: Whether the beginning of the assistant's next turn follows.

        Raises:
            TemplateRefusal: If the template cannot show them.
        """
        from jinja2 import TemplateError

        try:
            text: str = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=[dict(tool) for tool in tools] or None,
                chat_template=self.text,
                add_generation_prompt=generation_prompt,
                tokenize=False,
                **self._arguments,
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise TemplateRefusal(
                f"the chat template of {self.name} refuses its messages (roles: {roles}): {error}"
            ) from error
        return text

    @cached_property
    def generation_prompt(self) -> str:
        """What it puts behind a question to have it answered."""
        question = self.render([ANY_USER], generation_prompt=False)
        prompt = self.render([ANY_USER])
        return prompt[len(shared(question, prompt)) :]

    def shows_tools(self, tools: Tools) -> bool:
        """Whether it tells the model the name of every tool."""
        without, shown = self.render([ANY_USER]), self.render([ANY_USER], tools)
        names = [str(tool.get("function", tool).get("name")) for tool in tools]
        return all(shown.count(name) > without.count(name) for name in names)

    @cached_property
    def strips_thinking(self) -> bool:
        """Whether it leaves out what the assistant thought in earlier turns.

        That is thinking between ``<think>`` and ``</think>``, or a beginning of it that the generation prompt gives.
        """
        thought, answer = "Thought7f3a", "Answer7f3a"

        def later(content: str) -> str:
            return self.render([ANY_USER, {"role": "assistant", "content": content}, ANY_USER])

        try:
            history, shown, _ = later(answer).partition(answer)
            prompt = self.render([ANY_USER])
            whole = later(f"<think>\n{thought}\n</think>\n\n{answer}")
        except TemplateRefusal:
            return False
        drops_beginning = len(history) < len(prompt) and prompt.startswith(history)
        return bool(shown) and (drops_beginning or thought not in whole)


def shared(first: str, second: str) -> str:
    """What two texts begin with."""
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    return "".join(character for character, _ in pairs)
