"""The self-test of a chat template at start-up: can a conversation be continued turn by turn with it?"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from grpo_lightning.errors import ConfigurationError
from grpo_lightning.rollout.chat_template import ANY_USER, ChatTemplate, Tools
from grpo_lightning.rollout.continuation import Suffix, TurnRenderer, dummy_message
from grpo_lightning.rollout.types import Message

_TURNS = 2
"""One more than the first, to notice templates that show later turns differently."""


class TurnCheck(NamedTuple):
    """What is tried.

    Attributes:
        template: The chat template.
        turns: Its continuations.
        first: Text of the prompt of a whole conversation.
        through_tokens: What is left of a text that is encoded and decoded.
    """

    template: ChatTemplate
    turns: TurnRenderer
    first: Callable[[Sequence[Message], Tools], str]
    through_tokens: Callable[[str], str]

    def __call__(self, role: str, tools: Tools) -> None:
        """Play a conversation whose environment speaks in one role.

        Raises:
            ConfigurationError: Naming the template, the role and what is wrong.
        """
        conversation: list[Message] = [ANY_USER]
        for turn in range(_TURNS):
            news = dummy_message(role, f"News{turn}a7f3", tools)
            before = self.first(conversation, tools)
            suffix = self.turns.suffix([news], tools)
            conversation += [self.turns.answer_before(news, tools), news]
            wrong = self._difference(suffix, news, before, self.first(conversation, tools))
            if wrong:
                raise ConfigurationError(
                    f"expected a chat template that shows messages of the role {role!r} turn by turn, but with that of "
                    f"{self.template.name} {wrong}. Give another with chat_template=FILE, or have the environment use "
                    "another role"
                )

    def _difference(self, suffix: Suffix, news: Message, before: str, whole: str) -> str | None:
        shown = self.through_tokens(suffix.close + suffix.rest)
        if news["content"] not in shown:
            return f"a new message does not appear in what is appended ({shown!r})"
        # Some templates have the assistant go on right behind the result of a tool, in the same turn.
        if news["role"] != "tool" and not suffix.rest.endswith(self.template.generation_prompt):
            return f"no generation prompt follows a new message ({shown!r})"
        end = self.through_tokens(whole)[-len(shown) :]
        if end != shown:
            return f"what is appended ({shown!r}) is not how the whole conversation ends ({end!r})"
        if not whole.startswith(before) and not self.template.strips_thinking:
            return f"the beginning of a conversation ({before!r}) is shown differently when it goes on"
        return None
