"""What users return as a reward, as a number."""

import math
from typing import Any


def finite(value: Any) -> float | None:
    """A number of any kind, numpy's and torch's included, as a float; None if it is none, or is not finite."""
    if isinstance(value, str | bytes):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
    return number if math.isfinite(number) else None
