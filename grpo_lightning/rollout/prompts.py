"""From a task's messages to token ids, and back from sampled ids to text."""

from collections.abc import Sequence
from typing import Any

from grpo_lightning.errors import ConfigurationError
from grpo_lightning.rollout.types import Task


class PromptEncoder:
    """Tokenizer, chat template and stop tokens of a model.

    Args:
        model: Directory or hub name of the model.
        max_tokens: Longest prompt.
    """

    def __init__(self, model: str, max_tokens: int) -> None:
        from transformers import AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(model)
        self._max_tokens = max_tokens
        self.stop_token_ids = _stop_token_ids(model, self._tokenizer)
        if not self.stop_token_ids:
            raise ConfigurationError(f"{model} names no end-of-sequence token, so no completion could ever end")

    def __call__(self, task: Task) -> list[int]:
        """The prompt, ending where the assistant's answer begins.

        A tokenizer without chat template takes a single user message as plain text.

        Raises:
            ConfigurationError: If the prompt is too long, or needs a chat template that the tokenizer lacks.
        """
        if self._tokenizer.chat_template is not None:
            encoded = self._tokenizer.apply_chat_template(
                [dict(m) for m in task.messages], add_generation_prompt=True, return_dict=True
            )["input_ids"]
        elif len(task.messages) == 1:
            encoded = self._tokenizer(task.messages[0]["content"])["input_ids"]
        else:
            raise ConfigurationError(
                f"task {task.id!r} has {len(task.messages)} messages, but the tokenizer has no chat template"
            )
        ids = list(encoded)
        if not 0 < len(ids) <= self._max_tokens:
            raise ConfigurationError(
                f"task {task.id!r}: expected a prompt of 1 to {self._max_tokens} tokens, but it has {len(ids)}; "
                "shorten it or raise max_prompt_tokens"
            )
        return ids

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
