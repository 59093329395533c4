"""Naming a factor by the count that somebody divided by, or forgot to divide by."""

from collections.abc import Mapping

TOLERANCE = 1e-3
"""Relative distance within which a factor is a ratio of counts. Rounding in float32 stays below 1e-5."""


def explain_factor(factor: float, counts: Mapping[str, float]) -> str | None:
    """The count that a factor equals, or is the inverse of; None if it is none of them.

    Args:
        factor: Measured over expected.
        counts: Counts by what is counted.
    """
    for name, count in counts.items():
        if abs(count - 1) <= TOLERANCE or count <= 0:
            continue
        if abs(factor / count - 1) <= TOLERANCE:
            return f"{factor:.4g} is the number of {name}: it was not divided by"
        if abs(factor * count - 1) <= TOLERANCE:
            return f"{factor:.4g} is 1 over the number of {name}: it was divided by once too often"
    return None
