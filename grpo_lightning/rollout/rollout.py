"""One epoch's samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from grpo_lightning.rollout.batch import PackedBatch
from grpo_lightning.rollout.episode import Group, ledgers_of
from grpo_lightning.rollout.generation_record import GenerationRecord
from grpo_lightning.rollout.micro_batches import Layout, cut
from grpo_lightning.rollout.packing import TokenWeights
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
    """

    version: int
    number: int
    epoch: int
    tasks: tuple[int, ...]
    metrics: Mapping[str, float]


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
        record: What the engine returned for it; None in all processes but the first, and where it was restored from a
            checkpoint.
    """

    origin: Origin
    layout: Layout
    groups: tuple[Group, ...]
    batches: tuple[PackedBatch, ...]
    stored: Tensor
    record: GenerationRecord | None = None

    def stored_logprobs(self, ledger_index: Tensor) -> Tensor:
        """The engine's logprobs of sampled tokens.

        Args:
            ledger_index: `PackedBatch.ledger_index` of each, int64 ``[N]``.

        Returns:
            Float64 ``[N]``; NaN where the rollout has no such token.
        """
        found = torch.full(ledger_index.shape, torch.nan, dtype=torch.float64)
        known = (ledger_index >= 0) & (ledger_index < len(self.stored))
        found[known] = self.stored[ledger_index[known]]
        return found


def make_rollouts(
    origin: Origin,
    groups: Sequence[Group],
    layout: Layout,
    token_weights: TokenWeights,
    sampling: SamplingSettings,
    record: GenerationRecord | None = None,
) -> list[Rollout]:
    """A rollout for each process; samples, ledger and record in the first alone.

    Arguments as in `micro_batches.cut` and `Rollout`.
    """
    parts = cut(groups, layout, token_weights, sampling)
    columns = [ledger.logprobs for ledger in ledgers_of(groups)]
    stored = torch.from_numpy(np.concatenate(columns))
    return [
        Rollout(origin, layout, tuple(groups), batches, stored, record)
        if rank == 0
        else Rollout(origin, layout, (), batches, stored[:0])
        for rank, batches in enumerate(parts)
    ]
