"""Reward functions written for TRL's GRPOTrainer."""

import inspect
from collections.abc import Awaitable, Callable, Sequence
from inspect import Parameter
from typing import Any

from grpo_lightning.errors import RewardError
from grpo_lightning.rollout.types import Message

_BATCH = ("completions", "prompts")
"""What TRL itself passes beside the columns, as far as it exists for a single completion."""


class TRLReward:
    """A reward function of TRL's ``GRPOTrainer``, unchanged: called with a batch of one completion.

    It gets ``completions``, ``prompts`` and the fields of the task, each as a list of one, and returns a list of one
    number or None. What TRL's trainer passes of its own state (``trainer_state``, ``completion_ids``, ``log_metric``)
    does not exist here: a function that cannot do without is refused before training. A function that compares the
    completions of a batch with each other sees only one.

    Args:
        function: The function, plain or async. On the command line, its import path.
        conversational: Give prompts and completions as lists of chat messages, as TRL does for conversational data;
            otherwise as texts, the prompt being the last message's.
    """

    def __init__(self, function: Callable[..., Any], conversational: bool = True) -> None:
        self.__name__ = getattr(function, "__name__", None) or type(function).__name__
        self._function = function
        self._conversational = conversational
        parameters = inspect.signature(function).parameters.values()
        keywords = [p for p in parameters if p.kind is Parameter.VAR_KEYWORD]
        columns = [p for p in parameters if p.name not in _BATCH and p.kind is not Parameter.VAR_POSITIONAL]
        self._passed = [name for name in _BATCH if keywords or any(p.name == name for p in parameters)]
        # TRL has no such argument, and functions may pass on whatever they get.
        self._wants_episode = any(p.name == "episode" for p in columns)
        # The scorer passes what the signature asks for, and refuses what the tasks lack.
        self.__signature__ = inspect.Signature(
            [
                Parameter("completion", Parameter.POSITIONAL_ONLY),
                Parameter("prompt", Parameter.KEYWORD_ONLY),
                *(p.replace(kind=Parameter.KEYWORD_ONLY) for p in columns if p not in keywords),
                *keywords,
            ]
        )

    def __call__(
        self, completion: str, /, *, prompt: Sequence[Message], **columns: Any
    ) -> float | Awaitable[float | None] | None:
        """The reward of one completion, or an awaitable of it if the function is async.

        Raises:
            RewardError: If the function does not return a list of one.
        """
        if not self._wants_episode:
            columns.pop("episode", None)
        batch = {
            "completions": [[{"role": "assistant", "content": completion}] if self._conversational else completion],
            "prompts": [[dict(message) for message in prompt] if self._conversational else prompt[-1]["content"]],
        }
        result = self._function(
            **{name: batch[name] for name in self._passed}, **{name: [value] for name, value in columns.items()}
        )
        return self._awaited(result) if inspect.isawaitable(result) else self._only(result)

    async def _awaited(self, result: Awaitable[Any]) -> float | None:
        return self._only(await result)

    def _only(self, values: Any) -> float | None:
        try:
            (value,) = values
        except (TypeError, ValueError):
            raise RewardError(
                f"expected the TRL reward {self.__name__!r} to return a list of one value for its batch of one "
                f"completion, but got {values!r}"
            ) from None
        number: float | None = value
        return number
