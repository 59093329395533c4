"""What the checks see of a micro-batch: the very tensors that the loss used.

Shapes: ``N`` sampled tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class MicroBatchEvidence:
    """Sampled tokens of one or several micro-batches, fillers left out, on the CPU, without gradient.

    Attributes:
        batch_index: Position of the micro-batch in its rollout, over all processes, int64 ``[N]``.
        token_index: Position of the token in its micro-batch, int64 ``[N]``.
        sequence: Number of its sequence, unique within the update, int64 ``[N]``.
        first_of_rollout: Whether its micro-batch was the first after sampling, bool ``[N]``.
        logprobs: Under the current policy, float64 ``[N]``.
        log_ratio: The log-ratio that the loss used, before clipping, float64 ``[N]``.
        stored: The engine's logprobs in the rollout's own ledger, not the batch's, float64 ``[N]``; NaN if unknown.
        weighted_advantage: Loss weight times advantage, float64 ``[N]``.
        updates_since_sampling: Changes of the policy since the token was sampled, int64 ``[N]``.
        clipped_low: Whether the lower clip binds, bool ``[N]``.
        clipped_high: Whether the upper clip binds, bool ``[N]``.
        entropy: Of the current policy at this position, nats, float64 ``[N]``.
        reference_kl: k3 to the reference, nats, float64 ``[N]``; NaN if it was not computed.
    """

    batch_index: Tensor
    token_index: Tensor
    sequence: Tensor
    first_of_rollout: Tensor
    logprobs: Tensor
    log_ratio: Tensor
    stored: Tensor
    weighted_advantage: Tensor
    updates_since_sampling: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    entropy: Tensor
    reference_kl: Tensor

    def __len__(self) -> int:
        return self.logprobs.shape[0]

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """All tokens of an update's micro-batches, with sequences numbered apart."""
        joined = {f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(cls)}
        # Sequence numbers restart in every micro-batch.
        pairs = torch.stack([joined["batch_index"], joined["sequence"]], dim=1)
        joined["sequence"] = torch.unique(pairs, dim=0, return_inverse=True)[1]
        return cls(**joined)
