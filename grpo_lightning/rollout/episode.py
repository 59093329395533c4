"""Finished episodes and their groups. All immutable: a turn's data belong to that turn."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from grpo_lightning.errors import LedgerError, RolloutError
from grpo_lightning.rollout.ledger import NO_VERSION, Ledger, Source
from grpo_lightning.rollout.types import Action, Message, Task

EpisodeStatus = Literal["terminated", "truncated", "error"]
"""Ended by the environment; cut off by a limit; broken, so that it says nothing about the policy."""

ENVIRONMENT_REWARD = "environment"
"""Name, among an episode's rewards, of the sum of what the environment gave for its turns."""


@dataclass(frozen=True)
class Turn:
    """One action and what came of it.

    Attributes:
        messages: What the environment said since the last action.
        action: What the policy did, or what was done in its place.
        reward: What the environment gave for it; None if it gives none.
        error: What was wrong with the action, as the policy was told.
        info: What else the environment said of it, plain values.
        segment: Which of the episode's ledgers holds its tokens.
    """

    messages: tuple[Message, ...]
    action: Action
    reward: float | None = None
    error: str | None = None
    info: Mapping[str, Any] = field(default_factory=dict)
    segment: int = 0


@dataclass(frozen=True)
class Episode:
    """One finished episode.

    Attributes:
        turns: Its turns, in order.
        ledgers: Its tokens: one sequence, or several if the episode had to be split.
        rewards: Raw value of each reward by name; None where it does not apply.
        reward: Weighted sum of those that apply, or None if the episode cannot be scored.
        status: How it ended.
        failure: Why it cannot be scored.
        closing: What the environment said after the last action; the policy never saw it.
        attempts: How often it was begun; more than once after a fault of the infrastructure.
        masked: Whether its tokens are kept out of the loss although its reward counts in its group.

    Raises:
        LedgerError: If the sampled tokens of the ledgers are not those of the actions, bit for bit.
    """

    turns: tuple[Turn, ...]
    ledgers: tuple[Ledger, ...]
    rewards: Mapping[str, float | None]
    reward: float | None
    status: EpisodeStatus = "terminated"
    failure: str | None = None
    closing: tuple[Message, ...] = ()
    attempts: int = 1
    masked: bool = False

    def __post_init__(self) -> None:
        for name, column in (("token_ids", "token_ids"), ("token_logprobs", "logprobs")):
            said, kept = [], []
            for turn in self.turns:
                if not turn.action.was_forced:
                    said += getattr(turn.action, name)
            for ledger in self.ledgers:
                kept += getattr(ledger, column)[ledger.sampled].tolist()
            if said != kept:
                raise LedgerError(
                    f"expected the ledger's sampled tokens to be those of the {len(self.turns)} actions, in order, but "
                    f"{column} differ ({len(kept)} in the ledger, {len(said)} in the actions)"
                )

    @property
    def text(self) -> str:
        """What was said in the last turn."""
        return self.turns[-1].action.text if self.turns else ""

    def count(self, source: Source) -> int:
        """Tokens of one source, in all of its ledgers."""
        return sum(ledger.count(source) for ledger in self.ledgers)


def said(task: Task, text: str) -> Episode:
    """An episode of one answer of which nothing but the text is known, for trying rewards.

    Args:
        task: What it answers.
        text: The answer.
    """
    return Episode((Turn(task.messages, Action(text, (), (), 0.0, False, "stop", NO_VERSION)),), (), {}, None)


@dataclass(frozen=True)
class Group:
    """The episodes of one task.

    Attributes:
        task: The task.
        episodes: In seed order.
        advantages: For each episode one value per turn; 0 where it cannot be scored. Empty for evaluation.
        greedy: Reward of the greedy answer to the task, where advantages compare with it.

    Raises:
        RolloutError: If the episodes do not begin with the same prompt.
    """

    task: Task
    episodes: tuple[Episode, ...]
    advantages: tuple[tuple[float, ...], ...] = ()
    greedy: float | None = None

    def __post_init__(self) -> None:
        ledgers = [episode.ledgers[0] for episode in self.episodes if episode.ledgers]
        different = {ledger.prompt_ids for ledger in ledgers}
        if len(different) > 1:
            raise RolloutError(
                f"task {self.task.id!r}: expected all episodes of a group to begin with the same prompt, but there are "
                f"{len(different)} different ones. Advantages compare answers to one question: make the environment's "
                "reset depend on task.seed and task.data alone"
            )

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The prompt that the episodes share; empty if none has begun."""
        return next((episode.ledgers[0].prompt_ids for episode in self.episodes if episode.ledgers), ())


def ledgers_of(groups: Iterable[Group]) -> list[Ledger]:
    """All ledgers in the order that numbers ledger rows: groups, episodes, ledgers."""
    return [ledger for group in groups for episode in group.episodes for ledger in episode.ledgers]


class Predictions(tuple[Group, ...]):
    """Answered tasks as one value: Lightning would take a plain tuple apart to move it between devices."""

    def to(self, device: Any, non_blocking: bool = False) -> Self:
        """Itself: there are no tensors."""
        return self
