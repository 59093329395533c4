"""The values that flow from an engine to the packed batch. All immutable: a turn's data belong to that turn."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

Message = Mapping[str, Any]
"""One chat message in the OpenAI shape: ``{"role": ..., "content": ...}``."""

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Task:
    """One problem to solve.

    Attributes:
        id: Stable name, unique within its source.
        messages: The conversation that the policy continues.
        data: Everything else the source knows (answer, difficulty, ...); reward functions ask for its keys by
            parameter name.
    """

    id: str
    messages: tuple[Message, ...]
    data: Mapping[str, Any]


@dataclass(frozen=True)
class SamplingSettings:
    """How completions are sampled.

    There is no top-p or top-k: truncated sampling draws from another distribution than the one the trainer
    differentiates, and the ratios would be wrong without any sign of it.

    Attributes:
        max_tokens: Longest completion, in tokens.
        temperature: Softmax temperature; 0 is greedy (evaluation only). The trainer divides by the same one.
        stop_token_ids: Tokens that end a completion; the one that did is part of it.
        stop: Texts that end a completion with the token that completes one of them; that token is part of it.
        banned_token_ids: Tokens that have probability 0. The trainer leaves them out of its softmax as well.
    """

    max_tokens: int
    temperature: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    banned_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class AdapterRef:
    """A published adapter. Name, id and path are never used twice.

    Attributes:
        name: Unique name: run, version and a nonce.
        id: Unique positive integer.
        path: Directory in PEFT's format.
        version: The policy version whose weights it holds.
    """

    name: str
    id: int
    path: Path
    version: int


@dataclass(frozen=True)
class Generation:
    """One completion as the engine made it.

    Attributes:
        token_ids: Sampled tokens, including the one that stopped it.
        logprobs: Processed (after temperature) log-probability of each sampled token.
        finish_reason: ``"stop"`` or ``"length"``.
        policy_version: Version that the engine served for all of these tokens.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    policy_version: int


@dataclass(frozen=True)
class Action:
    """What the policy did in one turn.

    Attributes:
        text: Decoded completion without special tokens.
        token_ids: Its tokens.
        token_logprobs: Sample-time log-probability of each token.
        logprob_sum: Their sum, in nats.
        was_forced: Whether the system chose it instead of the policy; forced tokens are never trained on.
        finish_reason: ``"stop"`` or ``"length"``.
        policy_version: Version it was sampled with.
    """

    text: str
    token_ids: tuple[int, ...]
    token_logprobs: tuple[float, ...]
    logprob_sum: float
    was_forced: bool
    finish_reason: FinishReason
    policy_version: int


@dataclass(frozen=True)
class Sample:
    """One finished episode of a group.

    Attributes:
        action: What the policy did.
        rewards: Raw value of each reward function, by name; None where it does not apply.
        reward: Weighted sum of those that apply, or None if the episode cannot be scored.
        failure: Why it cannot be scored.
    """

    action: Action
    rewards: Mapping[str, float | None]
    reward: float | None
    failure: str | None = None


@dataclass(frozen=True)
class Group:
    """The samples of one task.

    Attributes:
        task: The task.
        prompt_ids: Its prompt as token ids, shared by all samples.
        samples: One per sample, in seed order.
        advantages: One per sample; 0 where the sample cannot be scored. Empty for evaluation.
    """

    task: Task
    prompt_ids: tuple[int, ...]
    samples: tuple[Sample, ...]
    advantages: tuple[float, ...] = ()


class Predictions(tuple[Group, ...]):
    """Answered tasks as one value: Lightning would take a plain tuple apart to move it between devices."""

    def to(self, device: Any, non_blocking: bool = False) -> Self:
        """Itself: there are no tensors."""
        return self
