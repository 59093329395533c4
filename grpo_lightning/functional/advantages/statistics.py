"""Means and spreads of the samples that take part, over groups or over the batch.

Shapes: ``P`` prompts (groups), ``G`` samples per prompt.
"""

import torch
from torch import Tensor

Dim = int | tuple[int, ...]

GROUP: Dim = 1
"""Dimensions of a group: statistics of shape ``[P, 1]``."""

BATCH: Dim = (0, 1)
"""Dimensions of the batch: statistics of shape ``[1, 1]``."""


def comparable(valid_PG: Tensor) -> Tensor:
    """The valid samples that are not the only one of their group.

    A sample alone in its group has nothing to be compared with, and is not trained on. It has no say in the
    statistics of the batch either, so that those are of what is trained on.
    """
    return valid_PG & (valid_PG.sum(1, keepdim=True) >= 2)


def centred(values_PG: Tensor, among_PG: Tensor, dim: Dim) -> Tensor:
    """Values minus their mean over some samples; exactly 0 where these are all equal, and for other samples."""
    values = torch.where(among_PG, values_PG, 0.0)
    differences = torch.where(among_PG, values - mean(values, among_PG, dim), 0.0)
    # Equal rewards can differ from their own mean by a rounding error, which a small std would blow up.
    highest = values.masked_fill(~among_PG, -torch.inf).amax(dim, keepdim=True)
    lowest = values.masked_fill(~among_PG, torch.inf).amin(dim, keepdim=True)
    return torch.where(highest > lowest, differences, torch.zeros_like(differences))


def mean(values_PG: Tensor, among_PG: Tensor, dim: Dim) -> Tensor:
    """Mean over some samples; 0 where there are none."""
    count = among_PG.sum(dim, keepdim=True).clamp_min(1)
    return torch.where(among_PG, values_PG, 0.0).sum(dim, keepdim=True) / count


def population_std(centred_PG: Tensor, among_PG: Tensor, dim: Dim) -> Tensor:
    """Root of the mean square of centred values over some samples; 0 where there are none."""
    return mean(centred_PG.square(), among_PG, dim).sqrt()


def scaled(centred_PG: Tensor, std: Tensor, std_floor: float) -> Tensor:
    """Centred values over a standard deviation plus a floor; what is 0 stays 0, even over 0."""
    return torch.where(centred_PG == 0, torch.zeros_like(centred_PG), centred_PG / (std + std_floor))


def check_floor(std_floor: float) -> None:
    """Refuse a floor that cannot keep a division finite."""
    if not 0 < std_floor < float("inf"):
        raise ValueError(f"expected a finite std_floor > 0, but got {std_floor}")
