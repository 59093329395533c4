"""One epoch's samples."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from grpo_lightning.functional.marks import Marks
from grpo_lightning.rollout.batch import PackedBatch
from grpo_lightning.rollout.episode import Group, ledgers_of
from grpo_lightning.rollout.generation_record import GenerationRecord
from grpo_lightning.rollout.micro_batches import Layout, cut
from grpo_lightning.rollout.packing import TokenWeights
from grpo_lightning.rollout.rescored import Rescored, at_rows
from grpo_lightning.rollout.types import SamplingSettings


@dataclass(frozen=True)
class Origin:
    """Where a rollout comes from.

    Attributes:
        version: Policy version that sampled it.
        number: Rollouts before it.
        epoch: Epoch that it was made for.
        tasks: Index in the task source of each group's task.
        metrics: Its numbers.
        drawn: Tasks drawn for it; None if they are those of its groups.
        top_p: Mass of the likeliest tokens that its sampling kept.
        top_k: How many of them it kept; 0 for all.
    """

    version: int
    number: int
    epoch: int
    tasks: tuple[int, ...]
    metrics: Mapping[str, float]
    drawn: int | None = None
    top_p: float = 1.0
    top_k: int = 0

    @property
    def truncated(self) -> bool:
        """Whether some tokens could not be sampled for being unlikely."""
        return self.top_p < 1 or self.top_k > 0


@dataclass(frozen=True)
class Rollout:
    """One epoch's samples and the micro-batches made of them, as one training process sees them.

    Attributes:
        origin: Where it comes from.
        layout: How it was cut.
        groups: What was sampled; empty in all processes but the first.
        batches: This process's micro-batches of the whole epoch, in training order.
        stored: The engine's logprobs of all ledger rows (NaN where nothing was sampled), kept apart from the batches
            that the loss sees, float64; empty in all processes but the first.
        rescored: What the trainer said of it before training; None where the loss does not ask for that.
        record: What the engine returned for it; None in all processes but the first, and where it was restored from a
            checkpoint.
    """

    origin: Origin
    layout: Layout
    groups: tuple[Group, ...]
    batches: tuple[PackedBatch, ...]
    stored: Tensor
    record: GenerationRecord | None = None
    rescored: Rescored | None = None

    def stored_logprobs(self, ledger_index: Tensor) -> Tensor:
        """The engine's logprobs of sampled tokens.

        Args:
            ledger_index: `PackedBatch.ledger_index` of each, int64 ``[N]``.

        Returns:
            Float64 ``[N]``; NaN where the rollout has no such token.
        """
        return at_rows(self.stored, ledger_index)

    def with_metrics(self, metrics: Mapping[str, float]) -> Self:
        """The same rollout with further numbers."""
        return replace(self, origin=replace(self.origin, metrics={**self.origin.metrics, **metrics}))

    def with_rescored(self, rescored: Rescored, focus: Callable[[Tensor], Tensor] | None = None) -> Self:
        """The same rollout with what the trainer says of it, also in its batches.

        Args:
            rescored: What it says.
            focus: From the entropies of an optimizer step's tokens, float64 ``[N]``, to those that the surrogate is
                computed of, bool ``[N]``; all by default.
        """
        focused = torch.ones(len(rescored.update), dtype=torch.bool)
        if focus is not None:
            for update in range(self.layout.updates):
                rows = torch.nonzero(rescored.update == update)[:, 0]
                focused[rows] = focus(rescored.entropy[rows])

        def filled(batch: PackedBatch) -> PackedBatch:
            rows, device = batch.ledger_index.cpu(), batch.ledger_index.device
            left_out = at_rows((~focused).double(), rows) == 1
            return batch.replace(
                proximal_logprobs=rescored.proximal(rows).to(batch.old_logprobs), focus=~left_out.to(device)
            )

        return replace(self, rescored=rescored, batches=tuple(map(filled, self.batches)))


def make_rollouts(
    origin: Origin,
    groups: Sequence[Group],
    layout: Layout,
    token_weights: TokenWeights,
    sampling: SamplingSettings,
    record: GenerationRecord | None = None,
    marks: Marks | None = None,
) -> list[Rollout]:
    """A rollout for each process; samples, ledger and record in the first alone.

    Arguments as in `micro_batches.cut` and `Rollout`.
    """
    parts = cut(groups, layout, token_weights, sampling, marks)
    columns = [ledger.logprobs for ledger in ledgers_of(groups)]
    stored = torch.from_numpy(np.concatenate(columns))
    return [
        Rollout(origin, layout, tuple(groups), batches, stored, record)
        if rank == 0
        else Rollout(origin, layout, (), batches, stored[:0])
        for rank, batches in enumerate(parts)
    ]
