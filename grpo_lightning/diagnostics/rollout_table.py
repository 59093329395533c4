"""A rollout's ledgers as columns, to look its trained tokens up in.

Shapes: ``R`` ledger rows of the whole rollout, numbered as `PackedBatch.ledger_index` numbers them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grpo_lightning.rollout.episode import Episode, Group, ledgers_of
from grpo_lightning.rollout.ledger import Ledger, Source
from grpo_lightning.rollout.types import Action


@dataclass(frozen=True)
class RolloutTable:
    """All ledger rows.

    Attributes:
        token_ids: Tokens, int64 ``[R]``.
        logprobs: The engine's logprobs, float64 ``[R]``; NaN where nothing was sampled.
        source: `Source` of each, int8 ``[R]``.
        policy_version: Version that sampled it, int64 ``[R]``.
        turn: Turn of its episode, int64 ``[R]``.
        position: Position in its own sequence, int64 ``[R]``.
        advantages: What its group gave its turn, float64 ``[R]``; NaN without a turn.
    """

    token_ids: NDArray[np.int64]
    logprobs: NDArray[np.float64]
    source: NDArray[np.int8]
    policy_version: NDArray[np.int64]
    turn: NDArray[np.int64]
    position: NDArray[np.int64]
    advantages: NDArray[np.float64]

    @classmethod
    def of(cls, groups: Sequence[Group]) -> "RolloutTable":
        """The columns of a rollout."""
        ledgers = ledgers_of(groups)

        def column(name: str) -> NDArray[Any]:
            return np.concatenate([getattr(ledger, name) for ledger in ledgers])

        return cls(
            column("token_ids"),
            column("logprobs"),
            column("source"),
            column("policy_version"),
            column("turn"),
            np.concatenate([np.arange(len(ledger)) for ledger in ledgers]),
            np.concatenate([*_advantages(groups)]),
        )

    def __len__(self) -> int:
        return len(self.token_ids)


def _advantages(groups: Sequence[Group]) -> Iterator[NDArray[np.float64]]:
    for group in groups:
        given = group.advantages or ((),) * len(group.episodes)
        for episode, values in zip(group.episodes, given, strict=False):
            # Tokens behind the last turn, if there are any, belong to none.
            by_turn = np.append(np.asarray(values, dtype=np.float64), np.nan)
            for ledger in episode.ledgers:
                yield by_turn[np.minimum(ledger.turn, len(values))]


@dataclass(frozen=True)
class SampledRun:
    """Neighbouring tokens of one turn that count as sampled.

    Attributes:
        group: Its group.
        number: Its episode among the group's.
        ledger: Its sequence.
        start: First position in it.
        stop: Position behind the last.
    """

    group: Group
    number: int
    ledger: Ledger
    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.group.task.id}#{self.number}, turn {self.turn}"

    @property
    def key(self) -> tuple[int, int]:
        """Stands for its episode."""
        return id(self.group), self.number

    @property
    def episode(self) -> Episode:
        """Its episode."""
        return self.group.episodes[self.number]

    @property
    def turn(self) -> int:
        """Its turn in the episode."""
        return int(self.ledger.turn[self.start])

    @property
    def action(self) -> Action | None:
        """What the episode says was done in this turn; None if it knows of none."""
        return self.episode.turns[self.turn].action if self.turn < len(self.episode.turns) else None

    @property
    def token_ids(self) -> NDArray[np.int64]:
        """Its tokens."""
        return self.ledger.token_ids[self.start : self.stop]

    @property
    def logprobs(self) -> NDArray[np.float64]:
        """Their logprobs."""
        return self.ledger.logprobs[self.start : self.stop]


def sampled_runs(groups: Sequence[Group]) -> list[SampledRun]:
    """All turns that will be trained on, as the ledgers have them."""
    found = []
    for group in groups:
        for number, episode in enumerate(group.episodes):
            for ledger in episode.ledgers:
                rows = np.flatnonzero(ledger.source == Source.SAMPLED)
                if len(rows):
                    new = (np.diff(rows) > 1) | (np.diff(ledger.turn[rows]) > 0)
                    pieces = np.split(rows, np.flatnonzero(new) + 1)
                    found += [SampledRun(group, number, ledger, int(p[0]), int(p[-1]) + 1) for p in pieces]
    return found
