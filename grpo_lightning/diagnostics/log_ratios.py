"""Histograms of log-ratios by the number of updates since sampling."""

from typing import Any

import torch
from torch import Tensor

EDGES = torch.cat([-(10 ** torch.arange(1, -7.5, -0.5)), torch.zeros(1), 10 ** torch.arange(-7, 1.5, 0.5)]).double()
"""Edges of the bins in nats: half decades from 1e-7 to 10 on both sides of 0."""

MOST_UPDATES = 16
"""Tokens that are older than this share one histogram."""


class LogRatioHistograms:
    """Counts of log-ratios, per number of updates since sampling. Beyond the outer edges counts as the outer bin."""

    def __init__(self) -> None:
        self._counts: dict[int, Tensor] = {}

    def add(self, log_ratio: Tensor, updates_since_sampling: Tensor) -> None:
        """Count tokens.

        Args:
            log_ratio: Nats, ``[N]``.
            updates_since_sampling: Int64 ``[N]``.
        """
        bins = torch.bucketize(log_ratio.double(), EDGES[1:-1])
        ages = updates_since_sampling.clamp_max(MOST_UPDATES)
        for k in sorted(set(ages.tolist())):
            counts = torch.bincount(bins[ages == k], minlength=len(EDGES) - 1)
            self._counts[k] = self._counts[k] + counts if k in self._counts else counts

    def facts(self) -> dict[str, Any]:
        """``edges`` and the counts ``by_k``, as JSON values."""
        return {"edges": EDGES.tolist(), "by_k": {str(k): self._counts[k].tolist() for k in sorted(self._counts)}}

    def load(self, facts: dict[str, Any]) -> None:
        """Go on from `facts`."""
        self._counts = {int(k): torch.tensor(counts) for k, counts in facts["by_k"].items()}
