"""Count, mean, variance and range that can be merged without losing small spreads."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Summary of a set of numbers, all float64.

    Attributes:
        count: How many.
        mean: Their mean.
        m2: Sum of squared deviations from the mean.
        min: Smallest; +inf if there are none.
        max: Largest; -inf if there are none.
    """

    count: Tensor
    mean: Tensor
    m2: Tensor
    min: Tensor
    max: Tensor

    def stack(self) -> Tensor:
        """The five numbers as one tensor ``[5]``."""
        return torch.stack([self.count, self.mean, self.m2, self.min, self.max])

    @classmethod
    def unstack(cls, values: Tensor) -> Self:
        """From the five numbers of `stack`."""
        return cls(*values.unbind())

    @property
    def std(self) -> Tensor:
        """Population standard deviation; 0 if there are none."""
        return (self.m2 / self.count.clamp_min(1)).sqrt()


def moments(values: Tensor) -> Moments:
    """Moments of a tensor, in two passes and float64.

    Float32 sums of squares would give a std of 0 at 7e-6 around 1, and a negative variance at 1e-4.
    """
    values = values.detach().to(torch.float64).flatten()
    if not len(values):
        zero = values.new_zeros(())
        return Moments(zero, zero, zero, zero + torch.inf, zero - torch.inf)
    mean = values.mean()
    return Moments(values.new_tensor(len(values)), mean, (values - mean).square().sum(), values.amin(), values.amax())


def merge_moments(a: Moments, b: Moments) -> Moments:
    """Moments of the union, by Chan's update.

        delta = mean_b - mean_a
        mean = mean_a + delta n_b / n
        M = M_a + M_b + delta^2 n_a n_b / n

    Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
    variances", 1979.
    """
    count = a.count + b.count
    share = b.count / count.clamp_min(1)
    delta = b.mean - a.mean
    return Moments(
        count,
        a.mean + delta * share,
        a.m2 + b.m2 + delta.square() * a.count * share,
        torch.minimum(a.min, b.min),
        torch.maximum(a.max, b.max),
    )
