"""From a rollout's groups to the micro-batches of every training process."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from grpo_lightning.errors import ConfigurationError, RolloutError
from grpo_lightning.functional.marks import Marks
from grpo_lightning.rollout.batch import PackedBatch
from grpo_lightning.rollout.episode import Group
from grpo_lightning.rollout.marking import with_marks
from grpo_lightning.rollout.packing import TokenWeights, filler_row, locate, pack, split_rows, usable_rows
from grpo_lightning.rollout.types import SamplingSettings


@dataclass(frozen=True)
class Layout:
    """How a rollout is cut.

    Attributes:
        updates: Optimizer steps of one pass; divides the number of groups.
        micro_batches: Micro-batches of one optimizer step, per process.
        processes: Training processes.
        passes: How often the rollout is trained on.
    """

    updates: int
    micro_batches: int
    processes: int
    passes: int

    def check_accumulation(self, micro_batches: int) -> None:
        """Refuse another number of micro-batches per optimizer step than the rollout was cut for."""
        if micro_batches != self.micro_batches:
            raise ConfigurationError(
                f"expected {self.micro_batches} micro-batches per optimizer step, which the rollout was cut for, but "
                f"accumulate_grad_batches is {micro_batches} by now. Use GradientAccumulationScheduler to change it"
            )


def cut(
    groups: Sequence[Group],
    layout: Layout,
    token_weights: TokenWeights,
    sampling: SamplingSettings,
    marks: Marks | None = None,
) -> list[tuple[PackedBatch, ...]]:
    """Cut a rollout into micro-batches.

    Every process gets equally many, of about equally many tokens; those computed at the same time have the most
    similar sizes. The loss weights are those of the whole optimizer step over all processes.

    Args:
        groups: The rollout, with advantages.
        layout: Into what.
        token_weights: Loss weights from the sampled tokens of an optimizer step's episodes.
        sampling: How it was sampled.
        marks: Chooses tokens of an optimizer step (`PackedBatch.marked`).

    Returns:
        For each process its micro-batches in training order. `PackedBatch.index` counts over all processes.

    Raises:
        RolloutError: If no group can be trained on.
    """
    per_update = len(groups) // layout.updates
    located = locate(groups)
    steps = [usable_rows(located[i : i + per_update], token_weights) for i in range(0, len(groups), per_update)]
    some_rows = [row for rows in steps for row in rows]
    if not some_rows:
        raise RolloutError(_why_none(groups))
    # An update whose groups were all dropped still has its micro-batches, of weight 0.
    filler = filler_row(min(some_rows, key=lambda row: row.num_tokens))
    batches = []
    for rows in steps:
        pieces = split_rows(rows or [filler], layout.micro_batches * layout.processes)
        pieces.sort(key=lambda piece: -sum(row.num_tokens for row in piece))
        packed = [pack(piece, sampling.temperature, sampling.banned_token_ids) for piece in pieces]
        batches += packed if marks is None else with_marks(packed, marks)
    count = layout.processes
    return [
        tuple(
            batch.replace(index=count * position + rank, first_of_rollout=position == 0)
            for position, batch in enumerate(batches[rank::count] * layout.passes)
        )
        for rank in range(count)
    ]


def _why_none(groups: Sequence[Group]) -> str:
    masked = sum(episode.masked for group in groups for episode in group.episodes)
    reasons = Counter(e.failure for g in groups for e in g.episodes if e.failure)
    hint = (
        f"{masked} of {sum(len(g.episodes) for g in groups)} episodes were cut off by a limit, which mask_truncated "
        "keeps out of the loss: raise the limit, or train on them. "
    )
    return (
        f"none of the {len(groups)} groups can be trained on: each needs two episodes with a reward. "
        + (hint if masked else "")
        + "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
    )
