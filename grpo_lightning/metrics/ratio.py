"""Statistics of the PPO ratio before clipping."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from grpo_lightning.functional.moments import Moments, merge_moments, moments


class RatioStats(Metric):
    """Count, mean, std, min and max of the ratio over all sampled tokens, of all updates and all processes.

    Kept as ``ratio - 1 = expm1(log_ratio)`` in float64, so that a spread of 1e-6 around 1 is measured and not
    rounded away.

    >>> stats = RatioStats()
    >>> stats.update(torch.tensor([0.0, 0.1, -0.1]))
    >>> round(stats.compute()["max"].item(), 3)
    1.105
    """

    full_state_update = True
    moments: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        empty = moments(torch.empty(0)).stack()
        # Not reduced by sum or mean but gathered: Chan's merge needs each process's moments.
        self.add_state("moments", default=empty, dist_reduce_fx=None)

    def update(self, log_ratio: Tensor) -> None:
        """Add log-ratios of sampled tokens, any shape, before clipping."""
        self.moments = merge_moments(Moments.unstack(self.moments), moments(torch.expm1(log_ratio.double()))).stack()

    def compute(self) -> dict[str, Tensor]:
        """``mean``, ``std``, ``min``, ``max`` and ``count``, float64; NaN (count 0) without tokens."""
        gathered = self.moments.reshape(-1, 5)
        total = Moments.unstack(gathered[0])
        for other in gathered[1:]:
            total = merge_moments(total, Moments.unstack(other))
        nan = torch.full_like(total.mean, torch.nan)
        some = total.count > 0
        return {
            "mean": torch.where(some, 1 + total.mean, nan),
            "std": torch.where(some, total.std, nan),
            "min": torch.where(some, 1 + total.min, nan),
            "max": torch.where(some, 1 + total.max, nan),
            "count": total.count,
        }
