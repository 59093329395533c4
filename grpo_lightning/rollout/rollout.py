"""One epoch's samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_lightning.rollout.batch import PackedBatch
from grpo_lightning.rollout.micro_batches import Layout, cut
from grpo_lightning.rollout.packing import TokenWeights
from grpo_lightning.rollout.types import Group, SamplingSettings


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
        groups: What was sampled; empty in all processes but the first.
        batches: This process's micro-batches of the whole epoch, in training order.
        stored: The engine's logprobs of the micro-batches of all processes, by `PackedBatch.index`, kept apart from
            the batches that the loss sees; empty in all processes but the first.
    """

    origin: Origin
    groups: tuple[Group, ...]
    batches: tuple[PackedBatch, ...]
    stored: tuple[Tensor, ...]

    def stored_logprobs(self, batch_index: Tensor, token_index: Tensor) -> Tensor:
        """The engine's logprobs of sampled tokens.

        Args:
            batch_index: `PackedBatch.index` of each token's micro-batch, int64 ``[N]``.
            token_index: Position of each token in its micro-batch, int64 ``[N]``.

        Returns:
            Float64 ``[N]``; NaN where the rollout has no such token.
        """
        found = torch.full(batch_index.shape, torch.nan, dtype=torch.float64)
        for index in sorted(set(batch_index.tolist())):
            if 0 <= index < len(self.stored):
                mine = batch_index == index
                found[mine] = self.stored[index][token_index[mine]].double()
        return found


def make_rollouts(
    origin: Origin,
    groups: Sequence[Group],
    layout: Layout,
    token_weights: TokenWeights,
    sampling: SamplingSettings,
) -> list[Rollout]:
    """A rollout for each process; samples and ledger in the first alone. Arguments as in `micro_batches.cut`."""
    parts = cut(groups, layout, token_weights, sampling)
    ledger = tuple(batch.old_logprobs.clone() for together in zip(*parts, strict=True) for batch in together)
    return [
        Rollout(origin, tuple(groups) if rank == 0 else (), batches, ledger if rank == 0 else ())
        for rank, batches in enumerate(parts)
    ]
