"""The values that flow from an engine to the packed batch. All immutable: a turn's data belong to that turn."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from grpo_lightning.errors import LogprobValidationError

Message = Mapping[str, Any]
"""One chat message in the OpenAI shape: ``{"role": ..., "content": ...}``."""

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Task:
    """One problem to solve.

    Attributes:
        id: Stable name, unique within its source.
        messages: The conversation that the policy continues; empty where an environment begins it.
        data: Everything else the source knows (answer, difficulty, ...); reward functions ask for its keys by
            parameter name.
        seed: What an environment draws its start and its chances from; the same for all episodes of a group.
        env: Name of the environment, where there are several.
    """

    id: str
    messages: tuple[Message, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    env: str = ""


@dataclass(frozen=True)
class SamplingSettings:
    """How completions are sampled.

    With ``top_p`` or ``top_k`` tokens are drawn from another distribution than the one the trainer differentiates. The
    engine returns the logprobs of the one it drew from, and `RolloutDataModule` asks for a correction.

    Attributes:
        max_tokens: Longest completion, in tokens.
        temperature: Softmax temperature; 0 is greedy (evaluation only). The trainer divides by the same one.
        stop_token_ids: Tokens that end a completion; the one that did is part of it.
        stop: Texts that end a completion with the token that completes one of them; that token is part of it.
        banned_token_ids: Tokens that have probability 0. The trainer leaves them out of its softmax as well.
        top_p: Only the fewest likeliest tokens that hold this mass are drawn; 1 for all.
        top_k: Only so many of the likeliest tokens are drawn, before ``top_p`` applies; 0 for all.
    """

    max_tokens: int
    temperature: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    banned_token_ids: tuple[int, ...] = ()
    top_p: float = 1.0
    top_k: int = 0


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
        logprobs: Log-probability of each sampled token in the distribution that it was drawn from: after temperature,
            banned tokens and truncation.
        finish_reason: ``"stop"`` or ``"length"``.
        policy_version: Version that the engine served for all of these tokens.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    policy_version: int


@dataclass(frozen=True)
class ToolCall:
    """One call of a tool, as it was read from what the policy said.

    Attributes:
        name: Name of the tool; empty if it could not be read.
        arguments: Arguments by name.
        id: Names this call, so that its result can refer to it.
        error: Why it could not be read; None if it could.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""
    error: str | None = None


@dataclass(frozen=True)
class Action:
    """What the policy did in one turn.

    Attributes:
        text: Decoded completion without special tokens.
        token_ids: Its tokens.
        token_logprobs: Sample-time log-probability of each token; empty if it was forced.
        logprob_sum: Their sum, in nats.
        was_forced: Whether the system chose it instead of the policy; forced tokens are never trained on.
        finish_reason: ``"stop"`` or ``"length"``.
        policy_version: Version it was sampled with; -1 if it was forced.
        tool_calls: The calls of tools in it, where the environment offers any.

    Raises:
        LogprobValidationError: If there is not one logprob per sampled token, or any of a forced one.
    """

    text: str
    token_ids: tuple[int, ...]
    token_logprobs: tuple[float, ...]
    logprob_sum: float
    was_forced: bool
    finish_reason: FinishReason
    policy_version: int
    tool_calls: tuple[ToolCall, ...] = ()

    def __post_init__(self) -> None:
        expected = 0 if self.was_forced else len(self.token_ids)
        if len(self.token_logprobs) != expected:
            raise LogprobValidationError(
                f"expected one logprob per sampled token and none of forced ones, but got {len(self.token_logprobs)} "
                f"for {len(self.token_ids)} {'forced' if self.was_forced else 'sampled'} tokens"
            )
