"""A stored epoch computed again with given weights: the loss and the statistics that training sees, without engine."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from grpo_lightning.diagnostics import MicroBatchEvidence
from grpo_lightning.functional.marks import Marks
from grpo_lightning.metrics import EpochStatistics
from grpo_lightning.module import GRPOModule
from grpo_lightning.rollout.batch import PackedBatch
from grpo_lightning.rollout.episode import ledgers_of
from grpo_lightning.rollout.micro_batches import cut
from grpo_lightning.rollout.packing import TokenWeights
from grpo_lightning.rollout.types import SamplingSettings
from grpo_lightning.trajectories.stored import StoredEpoch

_KINDS = ("ppo/", "policy/", "mismatch/", "tokens/")
"""Which of the training's metrics a replay has; not times."""


@dataclass(frozen=True)
class ReplayedUpdate:
    """One optimizer step, computed but not taken.

    Attributes:
        loss: The loss over all of its micro-batches.
        metrics: Its numbers, under the names of ``docs/metrics.md``. Those of ``mismatch/`` are over all tokens that
            these very weights sampled, and missing if there are none.
    """

    loss: float
    metrics: Mapping[str, float]


def sampling_versions(stored: StoredEpoch) -> list[int]:
    """The policy versions that sampled an epoch, in order."""
    ledgers = ledgers_of(stored.groups)
    return sorted({int(version) for ledger in ledgers for version in ledger.policy_version[ledger.sampled]})


def update_batches(
    stored: StoredEpoch, token_weights: TokenWeights, marks: Marks | None = None
) -> list[list[PackedBatch]]:
    """The micro-batches of each optimizer step of one pass over the epoch, of all processes together.

    Args:
        stored: The epoch.
        token_weights: Loss weights, as for `micro_batches.cut`.
        marks: Chosen tokens, as there.

    Raises:
        RolloutError: If no group can be trained on.
    """
    # The longest completion has no say in how finished ones are cut.
    sampling = SamplingSettings(1, stored.temperature, banned_token_ids=stored.banned_token_ids)
    parts = cut(stored.groups, replace(stored.layout, passes=1), token_weights, sampling, marks)
    # No step is taken, so that every micro-batch is computed with the weights of the first.
    batches = [batch.replace(first_of_rollout=True) for together in zip(*parts, strict=True) for batch in together]
    size = stored.layout.micro_batches * stored.layout.processes
    return [batches[i : i + size] for i in range(0, len(batches), size)]


@torch.no_grad()
def replay_update(
    module: GRPOModule, batches: Sequence[PackedBatch], on_batch: Callable[[], object] = lambda: None
) -> ReplayedUpdate:
    """Compute an optimizer step with the module's weights as they are, and take none.

    Args:
        module: The policy and its loss.
        batches: The step's micro-batches.
        on_batch: Called after each.
    """
    loss, parts = 0.0, []
    for batch in batches:
        share, evidence = module.batch_loss(batch.to(module.device))
        loss += float(share)
        parts.append(evidence)
        on_batch()
    statistics = EpochStatistics()
    statistics.add_update(MicroBatchEvidence.join(parts), sum(batch.num_tokens for batch in batches))
    metrics = {name: value for name, value in statistics.compute().items() if name.startswith(_KINDS)}
    return ReplayedUpdate(loss, metrics)
