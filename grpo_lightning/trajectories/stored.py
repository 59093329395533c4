"""One epoch's trajectories as they are stored."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from grpo_lightning.rollout.episode import Group
from grpo_lightning.rollout.micro_batches import Layout
from grpo_lightning.rollout.rollout import Origin


@dataclass(frozen=True)
class StoredEpoch:
    """One epoch's trajectories.

    Attributes:
        origin: Where the rollout comes from.
        layout: How it was cut into micro-batches.
        temperature: Sampling temperature.
        banned_token_ids: Tokens that could not be sampled.
        groups: What was sampled, with advantages.
        log_ratios: Of each ledger row, in the order of groups, episodes, ledgers and tokens, the log-ratio that the
            loss saw last, float64; NaN where none was trained on. None if the epoch was not trained to its end.
    """

    origin: Origin
    layout: Layout
    temperature: float
    banned_token_ids: tuple[int, ...]
    groups: tuple[Group, ...]
    log_ratios: NDArray[np.float64] | None = None
