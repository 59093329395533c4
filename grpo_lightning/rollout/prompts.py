"""From a task's messages to token ids, and back from sampled ids to text."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from grpo_lightning.errors import ConfigurationError
from grpo_lightning.rollout.chat_template import ANY_USER, ChatTemplate, TemplateFacts, TemplateRefusal, Tools
from grpo_lightning.rollout.continuation import Continuation, TurnRenderer
from grpo_lightning.rollout.turn_check import TurnCheck
from grpo_lightning.rollout.types import Message, Task
from grpo_lightning.tasks import TaskSource

_MAX_CHECKED_TASKS = 2000


@dataclass(frozen=True)
class PromptSettings:
    """How messages become a prompt.

    Attributes:
        system_prompt: A system message to put first where a task has none; a task's own wins.
        chat_template: File with a Jinja chat template, in place of the tokenizer's.
        chat_template_args: Variables of the template, for example ``{"enable_thinking": False}``.
        plain_prompts: Take the text of a task's single message as it is, without any template.

    Raises:
        ConfigurationError: If the file is missing, or plain prompts are asked for together with what needs a template.
    """

    system_prompt: str | None = None
    chat_template: str | None = None
    chat_template_args: Mapping[str, Any] = field(default_factory=dict)
    plain_prompts: bool = False

    def __post_init__(self) -> None:
        if self.chat_template is not None and not Path(self.chat_template).is_file():
            raise ConfigurationError(
                f"expected chat_template to be a file with a Jinja template, but there is none at {self.chat_template}"
            )
        templated = [n for n in ("system_prompt", "chat_template", "chat_template_args") if getattr(self, n)]
        if self.plain_prompts and templated:
            raise ConfigurationError(
                f"expected plain_prompts or {templated[0]}, but got both: plain prompts pass through no chat template"
            )


class PromptRecord(TypedDict):
    """The settings as a checkpoint keeps them: ``chat_template`` is the file's text, which outlives the file."""

    system_prompt: str | None
    chat_template: str | None
    chat_template_args: dict[str, Any]
    plain_prompts: bool


class PromptEncoder:
    """Tokenizer, chat template and stop tokens of a model.

    Args:
        model: Directory or hub name of the model.
        max_tokens: Longest prompt.
        settings: How messages become a prompt.

    Raises:
        ConfigurationError: If the model has no tokenizer, no chat template or no end-of-sequence token, or the
            template does not know one of its arguments.
    """

    def __init__(self, model: str, max_tokens: int, settings: PromptSettings | None = None) -> None:
        from transformers import AutoTokenizer

        try:
            # Mistral's own format knows no Jinja template, and takes special tokens in a text for plain text.
            self._tokenizer: Any = AutoTokenizer.from_pretrained(model, mistral_format=False)
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"expected a tokenizer with {model}, but transformers says: {error}") from error
        self._max_tokens = max_tokens
        self._settings = settings or PromptSettings()
        self.stop_token_ids = _stop_token_ids(model, self._tokenizer)
        if not self.stop_token_ids:
            raise ConfigurationError(f"{model} names no end-of-sequence token, so no completion could ever end")
        self._template = None if self._settings.plain_prompts else self._load_template(model)
        self._turns = None if self._template is None else self._turn_renderer(self._template)

    def _load_template(self, model: str) -> ChatTemplate:
        path = self._settings.chat_template
        if path is None and self._tokenizer.chat_template is None:
            raise ConfigurationError(
                f"{model} has no chat template: give one with chat_template=FILE, or set plain_prompts=True to pass "
                "the text of single messages as it is"
            )
        text: str = self._tokenizer.get_chat_template() if path is None else Path(path).read_text(encoding="utf-8")
        return ChatTemplate(self._tokenizer, text, path or model, self._settings.chat_template_args)

    def _turn_renderer(self, template: ChatTemplate) -> TurnRenderer:
        special = [str(token) for token in self._tokenizer.added_tokens_decoder.values() if token.special]
        return TurnRenderer(template, self._tokenizer.convert_ids_to_tokens(list(self.stop_token_ids)), special)

    def __call__(self, task: Task) -> list[int]:
        """The prompt of a task's messages, ending where the assistant's answer begins.

        Raises:
            ConfigurationError: If the prompt is too long, or the messages do not fit the chat template.
        """
        self._require_single(task)
        return self.prompt(task.id, task.messages)

    def prompt(self, task: str, messages: Sequence[Message], tools: Tools = ()) -> list[int]:
        """The prompt of what a task begins with, ending where the assistant's answer begins.

        Args:
            task: Id of the task, for messages.
            messages: The conversation so far.
            tools: JSON schemas of the tools that may be called.

        Raises:
            ConfigurationError: If the prompt is too long, or the messages do not fit the chat template.
        """
        ids = self._named(task, messages, tools)
        if self._is_wrong(ids):
            raise ConfigurationError(
                f"task {task!r}: expected a prompt of 1 to {self._max_tokens} tokens, but it has {len(ids)}; "
                "shorten it or raise max_prompt_tokens"
            )
        return ids

    def record(self) -> PromptRecord:
        """What a checkpoint keeps of the settings."""
        return PromptRecord(
            system_prompt=self._settings.system_prompt,
            chat_template=None
            if self._settings.chat_template is None or self._template is None
            else self._template.text,
            chat_template_args=dict(self._settings.chat_template_args),
            plain_prompts=self._settings.plain_prompts,
        )

    def check(self, tasks: TaskSource) -> None:
        """Encode up to 2,000 tasks, evenly spread over the source.

        Raises:
            ConfigurationError: Naming the first task with a prompt of the wrong length, and how many there are.
        """
        count = min(len(tasks), _MAX_CHECKED_TASKS)
        lengths = {}
        for i in range(count):
            task = tasks[i * len(tasks) // count]
            self._require_single(task)
            ids = self._named(task.id, task.messages)
            if self._is_wrong(ids):
                lengths[task.id] = len(ids)
        if lengths:
            first, length = next(iter(lengths.items()))
            raise ConfigurationError(
                f"task {first!r}: expected a prompt of 1 to {self._max_tokens} tokens, but it has {length}; of "
                f"{count} checked tasks this is so for {len(lengths)}, the longest with {max(lengths.values())}. "
                "Shorten them or raise max_prompt_tokens"
            )

    def _is_wrong(self, ids: Sequence[int]) -> bool:
        return not 0 < len(ids) <= self._max_tokens

    def _require_single(self, task: Task) -> None:
        if self._template is None and len(task.messages) != 1:
            raise ConfigurationError(
                f"task {task.id!r}: expected a single message, because plain_prompts is set, but it has "
                f"{len(task.messages)}"
            )

    def _named(self, task: str, messages: Sequence[Message], tools: Tools = ()) -> list[int]:
        try:
            return self.first(messages, tools)
        except TemplateRefusal as error:
            raise ConfigurationError(f"task {task!r}: {error}") from error

    def first(self, messages: Sequence[Message], tools: Tools = ()) -> list[int]:
        """The prompt of a conversation, of any length, ending where the assistant's next answer begins.

        Args:
            messages: The conversation; it may hold earlier answers, ``{"role": "assistant", "content": text}``.
            tools: JSON schemas of the tools that may be called.

        Raises:
            ConfigurationError: If the messages do not fit the chat template.
        """
        if self._template is None:
            return list(self._tokenizer(_text(messages))["input_ids"])
        return self._ids(self._template.render(self.with_system_prompt(messages), tools))

    def continuation(
        self, completion_ids: Sequence[int], messages: Sequence[Message], tools: Tools = ()
    ) -> Continuation:
        """The tokens between the end of an answer and the beginning of the next.

        What the policy said stays as it is. A turn that it ended with any of the stop tokens is over; one that was cut
        off, or ended by a text, is closed as the template closes it. Plain prompts put the messages' text behind it.

        Args:
            completion_ids: The answer, as it was sampled.
            messages: What is new since then.
            tools: The tools of the conversation.

        Raises:
            ConfigurationError: If the template refuses the messages, or cannot be used turn by turn.
        """
        if self._turns is None:
            return Continuation((), tuple(self._ids(_text(messages), behind=self._eos)))
        suffix = self._turns.suffix(messages, tools)
        close = self._ids(suffix.close, behind=self._eos)
        rest = self._ids(suffix.rest, behind=suffix.close or self._eos)
        said = next(
            n for n in range(len(close), -1, -1) if list(completion_ids[len(completion_ids) - n :]) == close[:n]
        )
        missing = close[said:]
        if suffix.opens:
            return Continuation((), (*missing, *rest))
        if completion_ids and completion_ids[-1] in self.stop_token_ids:
            missing = []
        return Continuation(tuple(missing), tuple(rest))

    def forced(self, text: str) -> list[int]:
        """Tokens of an answer that is given in the policy's place, as the template shows one, up to its end.

        Raises:
            ConfigurationError: If the template cannot be used turn by turn.
        """
        if self._turns is None:
            return self._ids(text, behind=self._eos)
        return self._ids(self._turns.answer(text), behind=self._eos)

    def is_extension(self, token_ids: Sequence[int], messages: Sequence[Message], tools: Tools = ()) -> bool:
        """Whether a sequence is what the template shows of the whole conversation.

        It is not where the template leaves out earlier thinking. Whitespace and special tokens are not compared: the
        policy may have ended its turn in another way than the template would.

        Args:
            token_ids: The sequence, up to where the next answer begins.
            messages: The whole conversation, answers and new messages included.
            tools: The tools of the conversation.

        Raises:
            ConfigurationError: If the messages do not fit the chat template.
        """
        kept, shown = self.decode(token_ids), self.decode(self.first(messages, tools))
        return "".join(kept.split()) == "".join(shown.split())

    def shows_tools(self, tools: Tools) -> bool:
        """Whether the chat template tells the model of the tools; plain prompts never do."""
        return self._template is not None and self._template.shows_tools(tools)

    @property
    def strips_thinking(self) -> bool:
        """Whether the chat template leaves out what the assistant thought in earlier turns."""
        return self._template is not None and self._template.strips_thinking

    def template_facts(self, stop: Sequence[str] = ()) -> TemplateFacts | None:
        """What the chat template does with one question and its answer; None for plain prompts.

        Args:
            stop: Texts that end a completion, beside the stop tokens.

        Raises:
            ConfigurationError: If the template refuses a question.
        """
        if self._template is None or self._turns is None:
            return None
        question = self.with_system_prompt([ANY_USER])
        end = self._turns.end_of_last_answer()
        return TemplateFacts(
            name=self._template.name,
            renderings=[self._template.render(question) for _ in range(2)],
            asks="add_generation_prompt" in self._template.text,
            generation_prompt=self._template.generation_prompt,
            end=end,
            end_id=self._tokenizer.convert_tokens_to_ids(end) if end else None,
            stops=(*self._tokenizer.convert_ids_to_tokens(list(self.stop_token_ids)), *stop),
        )

    def check_turns(self, tools: Tools = (), roles: Sequence[str] = ("user",)) -> None:
        """Try whether the chat template can be used turn by turn.

        Args:
            tools: The tools that will be offered.
            roles: Roles of the messages that environments will send.

        Raises:
            ConfigurationError: Naming the template and the role that does not work.
        """
        if self._template is None or self._turns is None:
            return
        template = self._template
        check = TurnCheck(
            template,
            self._turns,
            first=lambda messages, tools: template.render(self.with_system_prompt(messages), tools),
            through_tokens=lambda text: self._tokenizer.decode(self._ids(text, behind=self._eos)),
        )
        for role in roles:
            check(role, tools)

    def _ids(self, text: str, behind: str = "") -> list[int]:
        """Tokens of a text as they are behind a special token, which keeps tokenizers from adding a leading space."""
        head = self._encode_text(behind)
        ids = self._encode_text(behind + text)
        return ids[len(head) :] if ids[: len(head)] == head else self._encode_text(text)

    def _encode_text(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    @property
    def _eos(self) -> str:
        return self._tokenizer.eos_token or ""

    def with_system_prompt(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The messages behind the system prompt of the settings, unless they have one."""
        prompt = self._settings.system_prompt
        if prompt is None or any(m["role"] == "system" for m in messages):
            return messages
        return [{"role": "system", "content": prompt}, *messages]

    def banned_token_ids(self, words: Iterable[str]) -> tuple[int, ...]:
        """The tokens of words that are one token each, sorted.

        Raises:
            ConfigurationError: If a word is several tokens, or one that ends completions.
        """
        banned = set()
        for word in words:
            ids = self._tokenizer(word, add_special_tokens=False)["input_ids"]
            if len(ids) != 1:
                raise ConfigurationError(
                    f"expected bad_words of one token each, but {word!r} is {len(ids)} tokens "
                    f"{self._tokenizer.convert_ids_to_tokens(ids)}: a longer word cannot be left out of the softmax"
                )
            if ids[0] in self.stop_token_ids:
                raise ConfigurationError(f"expected bad_words without {word!r}, which ends a completion")
            banned.add(ids[0])
        return tuple(sorted(banned))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text


def _text(messages: Sequence[Message]) -> str:
    return "".join(str(message["content"]) for message in messages)


def _stop_token_ids(model: str, tokenizer: Any) -> tuple[int, ...]:
    """End-of-sequence tokens of the tokenizer and of the model's generation settings."""
    from transformers import GenerationConfig

    try:
        configured = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:
        configured = None
    ids = configured if isinstance(configured, list) else [configured]
    return tuple(sorted({i for i in (*ids, tokenizer.eos_token_id) if i is not None}))
