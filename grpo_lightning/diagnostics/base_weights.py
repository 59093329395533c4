"""Telling whether the weights under an adapter stay what they were, without a copy of them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from grpo_lightning.policy import Policy

_SHARE = 16
_GLANCE = 64
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class BaseWeights:
    """The sums of all bits of the weights under a policy's adapter at one moment.

    Args:
        policy: The policy.
    """

    def __init__(self, policy: Policy) -> None:
        self._sums = {name: sum_of_bits(weight) for name, weight in _base(policy).items()}
        self._glances = _glances(_base(policy))
        self._turn = 0

    def changed(self, policy: Policy, *, everything: bool = False) -> tuple[list[str], int]:
        """Which weights have changed: a few elements of all are compared, and all of every 16th, in turn.

        Args:
            policy: The policy.
            everything: Compare all of all.

        Returns:
            Their names, and how many were compared in full.
        """
        weights = _base(policy)
        step = 1 if everything or _glances(weights) != self._glances else _SHARE
        names = list(weights)[self._turn % step :: step]
        self._turn += 1
        return [name for name in names if sum_of_bits(weights[name]) != self._sums.get(name)], len(names)


def _base(policy: Policy) -> dict[str, Tensor]:
    # By name: whether something is frozen is what may have changed.
    return {name: p.detach() for name, p in policy.model.named_parameters() if ".lora_" not in name}


def _glances(weights: Mapping[str, Tensor]) -> list[int]:
    """The same of a few elements of each, at even distances."""
    return [sum_of_bits(weight.flatten()[:: max(1, weight.numel() // _GLANCE)]) for weight in weights.values()]


def sum_of_bits(weight: Tensor) -> int:
    """The sum of a tensor's contents read as integers, modulo 2^64: a different one with different contents, but by
    chance."""
    flat = weight.contiguous().flatten()
    try:
        # The widest integers are the fewest.
        integers = flat.view(torch.int64)
    except RuntimeError:
        integers = flat.view(_INTEGERS[flat.element_size()])
    return int(integers.sum(dtype=torch.int64))
