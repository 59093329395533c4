"""From a task's messages to token ids, and back from sampled ids to text."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from grpo_lightning.errors import ConfigurationError
from grpo_lightning.rollout.types import Message, Task
from grpo_lightning.tasks import TaskSource

_GIVEN_TO_TEMPLATES = {"messages", "add_generation_prompt"}
"""Template variables that the encoder sets itself."""

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
            self._tokenizer: Any = AutoTokenizer.from_pretrained(model)
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"expected a tokenizer with {model}, but transformers says: {error}") from error
        self._max_tokens = max_tokens
        self._settings = settings or PromptSettings()
        self._template = None if self._settings.plain_prompts else self._load_template(model)
        self.stop_token_ids = _stop_token_ids(model, self._tokenizer)
        if not self.stop_token_ids:
            raise ConfigurationError(f"{model} names no end-of-sequence token, so no completion could ever end")

    def _load_template(self, model: str) -> str:
        from transformers.utils.chat_template_utils import _get_template_variables

        path = self._settings.chat_template
        if path is None and self._tokenizer.chat_template is None:
            raise ConfigurationError(
                f"{model} has no chat template: give one with chat_template=FILE, or set plain_prompts=True to pass "
                "the text of single messages as it is"
            )
        template: str = self._tokenizer.get_chat_template() if path is None else Path(path).read_text(encoding="utf-8")
        known = _get_template_variables(template) - _GIVEN_TO_TEMPLATES - set(self._tokenizer.special_tokens_map)
        known -= {"raise_exception", "strftime_now"}
        unknown = sorted(set(self._settings.chat_template_args) - known)
        if unknown:
            raise ConfigurationError(
                f"the chat template of {path or model} does not use {', '.join(map(repr, unknown))} "
                f"(chat_template_args); it knows {', '.join(sorted(known)) or 'no arguments'}"
            )
        return template

    def __call__(self, task: Task) -> list[int]:
        """The prompt, ending where the assistant's answer begins.

        Raises:
            ConfigurationError: If the prompt is too long, or the messages do not fit the chat template.
        """
        ids = self._encode(task)
        if self._is_wrong(ids):
            raise ConfigurationError(
                f"task {task.id!r}: expected a prompt of 1 to {self._max_tokens} tokens, but it has {len(ids)}; "
                "shorten it or raise max_prompt_tokens"
            )
        return ids

    def record(self) -> PromptRecord:
        """What a checkpoint keeps of the settings."""
        return PromptRecord(
            system_prompt=self._settings.system_prompt,
            chat_template=None if self._settings.chat_template is None else self._template,
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
            ids = self._encode(task)
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

    def _encode(self, task: Task) -> list[int]:
        if self._template is None:
            if len(task.messages) != 1:
                raise ConfigurationError(
                    f"task {task.id!r}: expected a single message, because plain_prompts is set, but it has "
                    f"{len(task.messages)}"
                )
            return list(self._tokenizer(task.messages[0]["content"])["input_ids"])
        from jinja2 import TemplateError

        try:
            encoded = self._tokenizer.apply_chat_template(
                [dict(m) for m in self._with_system_prompt(task.messages)],
                chat_template=self._template,
                add_generation_prompt=True,
                return_dict=True,
                **self._settings.chat_template_args,
            )
        except TemplateError as error:
            raise ConfigurationError(f"task {task.id!r}: the chat template refuses its messages: {error}") from error
        return list(encoded["input_ids"])

    def _with_system_prompt(self, messages: Sequence[Message]) -> Sequence[Message]:
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


def _stop_token_ids(model: str, tokenizer: Any) -> tuple[int, ...]:
    """End-of-sequence tokens of the tokenizer and of the model's generation settings."""
    from transformers import GenerationConfig

    try:
        configured = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:
        configured = None
    ids = configured if isinstance(configured, list) else [configured]
    return tuple(sorted({i for i in (*ids, tokenizer.eos_token_id) if i is not None}))
