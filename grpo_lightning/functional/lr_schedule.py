"""The learning rate over a run."""

import math
from typing import Literal

LRSchedule = Literal["constant", "linear", "cosine"]


def lr_factor(update: int, *, warmup: int, planned: int, schedule: LRSchedule) -> float:
    r"""Factor on the peak learning rate for an optimizer step.

    .. math:: f(u) = u / w \quad (u < w),\qquad p = \min\bigl(1, (u - w) / (n - w)\bigr),\qquad
              f(u) = 1,\; 1 - p,\; \tfrac12 (1 + \cos \pi p)

    for the constant, the linear and the cosine schedule.

    Args:
        update: Optimizer steps taken before, :math:`u`.
        warmup: Steps over which the rate rises from 0, :math:`w`.
        planned: Steps of the whole run, :math:`n`; not used by the constant schedule.
        schedule: What comes after the warm-up.
    """
    if update < warmup:
        return update / warmup
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (update - warmup) / max(1, planned - warmup))
    return 1.0 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
