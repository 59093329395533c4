"""How likely one of several samples is correct."""

import math


def pass_at_k(correct: int, samples: int, k: int) -> float:
    """Unbiased estimate of the chance that at least one of ``k`` samples is correct.

        1 - C(n - c, k) / C(n, k)

    the share of the subsets of ``k`` of the ``n`` samples that hold at least one of the ``c`` correct ones.
    Source: Chen et al. 2021, https://arxiv.org/abs/2107.03374

    Args:
        correct: ``c``, samples that are correct.
        samples: ``n``, samples there are.
        k: Size of the subsets, from 1 to ``samples``.

    Returns:
        From 0 to 1.

    Raises:
        ValueError: If ``k`` or ``correct`` is out of range.

    >>> pass_at_k(correct=1, samples=4, k=2)
    0.5
    """
    if not 1 <= k <= samples:
        raise ValueError(f"expected k from 1 to the {samples} samples, but got {k}")
    if not 0 <= correct <= samples:
        raise ValueError(f"expected from 0 to {samples} correct samples, but got {correct}")
    subsets = math.comb(samples, k)
    # Whole numbers up to the division: 1 minus a rounded quotient would lose small chances.
    return (subsets - math.comb(samples - correct, k)) / subsets
