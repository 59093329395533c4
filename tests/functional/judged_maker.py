"""Judged rollouts for tests of advantage estimators, from plain lists."""

import math

import torch
from hypothesis import strategies as st

from grpo_lightning.functional.advantages import Judged


def make_judged(rewards, valid=None, *, lengths=None, greedy=None, parts=None, weights=None):
    """Groups of equal size; None as a reward means that the sample is not valid.

    Without parts there is one single reward, the reward itself. Without lengths all samples have 10 tokens.
    """
    prompts, samples = len(rewards), len(rewards[0])
    valid = valid or [[r is not None for r in row] for row in rewards]
    numbers = [[math.nan if r is None else r for r in row] for row in rewards]
    parts = parts or [[[r] for r in row] for row in numbers]
    numbers_of_parts = [[[math.nan if r is None else r for r in cell] for cell in row] for row in parts]
    return Judged(
        torch.tensor(numbers, dtype=torch.float64),
        torch.tensor(valid),
        torch.tensor(lengths or [[10] * samples] * prompts),
        torch.tensor([math.nan if g is None else g for g in greedy or [None] * prompts], dtype=torch.float64),
        torch.tensor(numbers_of_parts, dtype=torch.float64),
        torch.tensor(weights or [1.0] * len(parts[0][0]), dtype=torch.float64),
    )


def mean(values):
    return math.fsum(values) / len(values)


def std(values):
    """Of the population."""
    centre = mean(values)
    return math.sqrt(math.fsum((v - centre) ** 2 for v in values) / len(values))


def known(group):
    """The rewards of the valid samples."""
    return [r for r in group if r is not None]


def compared(rewards):
    """All rewards but those alone in their group."""
    return [r for group in rewards if len(known(group)) >= 2 for r in known(group)]


def by_group(rewards, advantage):
    """Advantages by a function of a sample's index and its group, 0 where there is nothing to compare."""
    return [
        [0.0 if r is None or len(known(group)) < 2 else advantage(i, group) for i, r in enumerate(group)]
        for group in rewards
    ]


# Eighths: equal values are frequent, and sums of a few are exact.
eighths = st.integers(-40, 40).map(lambda i: i / 8)


def grids(values, *, prompts=4, samples=6):
    """Groups of equal size of such values."""
    return st.integers(1, samples).flatmap(
        lambda g: st.lists(st.lists(values, min_size=g, max_size=g), min_size=1, max_size=prompts)
    )


rewards_or_none = grids(st.none() | eighths | eighths | eighths)
binary_or_none = grids(st.sampled_from([None, 0.0, 0.0, 1.0, 1.0]), samples=7)
