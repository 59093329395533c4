"""Tokens that are chosen for a whole optimizer step, whatever its micro-batches are."""

from collections.abc import Sequence
from zlib import crc32

import torch

from grpo_lightning.functional.marks import Marks
from grpo_lightning.rollout.batch import PackedBatch


def with_marks(batches: Sequence[PackedBatch], marks: Marks) -> list[PackedBatch]:
    """The micro-batches of an optimizer step with their chosen tokens.

    The choice does not depend on how the step was cut: tokens are looked at in the order of the ledger, those of
    fillers not at all, and the random numbers follow from what was sampled.

    Args:
        batches: All micro-batches of the step, of all processes.
        marks: Chooses.
    """
    real = torch.cat([batch.loss_weight != 0 for batch in batches])
    row = torch.cat([batch.ledger_index for batch in batches])
    old, advantage = (
        torch.cat([getattr(batch, name) for batch in batches]).double() for name in ("old_logprobs", "advantages")
    )
    chosen = torch.zeros_like(real)
    order = torch.nonzero(real)[:, 0]
    order = order[row[order].argsort()]
    if len(order):
        # Of the tokens and not of their logprobs, whose last bits depend on how the engine batched its requests.
        tokens = torch.cat([batch.target_ids for batch in batches])[order]
        generator = torch.Generator().manual_seed(crc32(tokens.numpy().tobytes()))
        keys = torch.rand(len(order), dtype=torch.float64, generator=generator)
        chosen[order] = marks(old[order], advantage[order], keys)
    sizes = [batch.num_targets for batch in batches]
    return [batch.replace(marked=marked) for batch, marked in zip(batches, torch.split(chosen, sizes), strict=True)]
