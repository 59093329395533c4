"""Two things or more, measured in turns: what the machine does beside them then falls on all alike."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def alternate(
    sides: Mapping[str, Callable[[], Any]],
    pairs: int,
    *,
    warmups: int = 0,
    tell: Callable[[str, int, Any], None] | None = None,
) -> dict[str, list[Any]]:
    """Call each side in turn: A, B, A, B, ...

    Args:
        sides: What is called, by name, in this order.
        pairs: How often each is called and counted.
        warmups: Calls of each before that, which are not counted.
        tell: Told name, number (below 0 for a warm-up) and result of each call.

    Returns:
        Results of each side, in order.

    Raises:
        ValueError: If there are fewer than two sides, or no pair.
    """
    if len(sides) < 2 or pairs < 1:
        raise ValueError(f"expected at least two sides and a pair, but got {len(sides)} sides and {pairs} pairs")
    found: dict[str, list[Any]] = {name: [] for name in sides}
    for number in range(-warmups, pairs):
        for name, side in sides.items():
            result = side()
            if number >= 0:
                found[name].append(result)
            if tell is not None:
                tell(name, number, result)
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and largest.

    >>> spread([3.0, 1.0, 2.0])
    {'median': 2.0, 'min': 1.0, 'max': 3.0}
    """
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Spread of the ratios of neighbours.

    >>> ratio([4.0, 9.0, 4.0], [2.0, 3.0, 4.0])
    {'median': 2.0, 'min': 1.0, 'max': 3.0}

    Args:
        above: A number of each pair.
        below: The other number of each pair.

    Raises:
        ValueError: If there are not equally many.
    """
    return spread([a / b for a, b in zip(above, below, strict=True)])


def shown(values: Mapping[str, float], form: str = ".2f") -> str:
    """A spread in a table.

    >>> shown({"median": 2.0, "min": 1.0, "max": 3.0}, ".0f")
    '2 (1 to 3)'
    """
    return f"{values['median']:{form}} ({values['min']:{form}} to {values['max']:{form}})"
