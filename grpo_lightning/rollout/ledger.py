"""The ledger of a trajectory: one row a token, with where it came from. What is trained on is read from here alone."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from grpo_lightning.errors import LedgerError

NO_VERSION = -1
"""`Ledger.policy_version` of tokens that no policy sampled."""

POSITIVE_TOLERANCE = 1e-3
"""A log-probability may exceed 0 by rounding, not by more."""


class Source(IntEnum):
    """Where a token comes from. Only what the policy sampled is ever trained on."""

    PROMPT = 0
    """What the sequence begins with."""
    SAMPLED = 1
    """Drawn from the policy by the engine."""
    FORCED = 2
    """Said in the policy's place by the system: a forced action, the end of a turn that was cut off."""
    ENVIRONMENT = 3
    """Observations, tool results and the chat template around them."""


@dataclass(frozen=True, eq=False)
class Ledger:
    """One sequence as the engine saw it, token by token. Immutable: its arrays are read-only.

    Attributes:
        token_ids: Tokens, int64 ``[L]``.
        source: `Source` of each, int8 ``[L]``; prompt tokens lead, and there is at least one.
        logprobs: Log-probability with which the engine sampled it, nats, float64 ``[L]``; NaN if it did not.
        policy_version: Version that sampled it, int64 ``[L]``; `NO_VERSION` if none did.
        turn: Turn of the episode that it belongs to, from 0, int64 ``[L]``; never falls. What an observation says
            belongs to the turn that answers it.

    Raises:
        LedgerError: If the columns contradict each other.
    """

    token_ids: NDArray[np.int64]
    source: NDArray[np.int8]
    logprobs: NDArray[np.float64]
    policy_version: NDArray[np.int64]
    turn: NDArray[np.int64]

    def __post_init__(self) -> None:
        for column in fields(self):
            values: NDArray[Any] = np.array(getattr(self, column.name), dtype=_DTYPES[column.name])
            values.flags.writeable = False
            object.__setattr__(self, column.name, values)
        self._check()

    def _check(self) -> None:
        lengths = {column.name: getattr(self, column.name).shape for column in fields(self)}
        if len(set(lengths.values())) != 1 or self.token_ids.ndim != 1:
            raise LedgerError(f"expected columns of one length, but got {lengths}")
        unknown = (self.source < min(Source)) | (self.source > max(Source))
        if unknown.any():
            raise LedgerError(f"expected sources 0 to {max(Source).value}, but got {self.source[unknown][0]}")
        prompt = int((self.source == Source.PROMPT).sum())
        if prompt == 0 or (self.source[:prompt] != Source.PROMPT).any():
            raise LedgerError("expected a sequence that begins with all of its prompt tokens, at least one")
        if (self.token_ids < 0).any():
            raise LedgerError(f"expected token ids >= 0, but got {int(self.token_ids.min())}")
        sampled = self.sampled
        wrong = sampled & ~(np.isfinite(self.logprobs) & (self.logprobs <= POSITIVE_TOLERANCE))
        if wrong.any():
            raise LedgerError(
                f"expected a finite logprob <= 0 of each sampled token, but {int(wrong.sum())} of {int(sampled.sum())} "
                f"have none, for example {self.logprobs[wrong][0]}"
            )
        if not np.isnan(self.logprobs[~sampled]).all():
            raise LedgerError("expected no logprob of tokens that the policy did not sample, but some have one")
        if (self.policy_version[~sampled] != NO_VERSION).any():
            raise LedgerError("expected no policy version of tokens that the policy did not sample, but some have one")
        if (self.turn < 0).any() or (np.diff(self.turn) < 0).any():
            raise LedgerError("expected turns that start at 0 or later and never fall")

    @classmethod
    def of_prompt(cls, token_ids: Sequence[int], turn: int = 0) -> Self:
        """A sequence that has only begun.

        Args:
            token_ids: Its prompt, at least one token.
            turn: The turn that will answer it.
        """
        return cls(**_piece(token_ids, Source.PROMPT, turn))

    def extended(
        self,
        token_ids: Sequence[int],
        source: Source,
        turn: int,
        logprobs: Sequence[float] | None = None,
        policy_version: int = NO_VERSION,
    ) -> Self:
        """The same sequence with more tokens behind it.

        Args:
            token_ids: The further tokens.
            source: Where they come from.
            turn: The turn that they belong to.
            logprobs: One for each of them if they were sampled.
            policy_version: Version that sampled them.

        Raises:
            LedgerError: If the tokens contradict their source.
        """
        piece = _piece(token_ids, source, turn, logprobs, policy_version)
        return type(self)(**{name: np.concatenate([getattr(self, name), values]) for name, values in piece.items()})

    def __len__(self) -> int:
        return len(self.token_ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ledger) and all(
            np.array_equal(getattr(self, c.name), getattr(other, c.name), equal_nan=c.name == "logprobs")
            for c in fields(self)
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def sampled(self) -> NDArray[np.bool_]:
        """Which tokens the policy sampled, ``[L]``."""
        sampled: NDArray[np.bool_] = self.source == Source.SAMPLED
        return sampled

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return int((self.source == Source.PROMPT).sum())

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The prompt."""
        return tuple(self.token_ids[: self.prompt_length].tolist())

    def count(self, source: Source) -> int:
        """Tokens of one source."""
        return int((self.source == source).sum())


_DTYPES: dict[str, type] = {
    "token_ids": np.int64,
    "source": np.int8,
    "logprobs": np.float64,
    "policy_version": np.int64,
    "turn": np.int64,
}
"""Dtype of each column."""


def _piece(
    token_ids: Sequence[int],
    source: Source,
    turn: int,
    logprobs: Sequence[float] | None = None,
    policy_version: int = NO_VERSION,
) -> dict[str, NDArray[Any]]:
    count = len(token_ids)
    if logprobs is not None and len(logprobs) != count:
        raise LedgerError(f"expected one logprob per sampled token, but got {len(logprobs)} for {count}")
    return {
        "token_ids": np.array(token_ids, dtype=np.int64),
        "source": np.full(count, source),
        "logprobs": np.full(count, np.nan) if logprobs is None else np.array(logprobs, dtype=np.float64),
        "policy_version": np.full(count, policy_version),
        "turn": np.full(count, turn),
    }
