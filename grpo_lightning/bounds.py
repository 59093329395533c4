"""Numbers among the settings that are refused by name."""

import math

from grpo_lightning.errors import ConfigurationError


def require_positive(**values: float) -> None:
    """Refuse settings that are not above 0.

    Raises:
        ConfigurationError: If one is 0, negative, infinite or no number.
    """
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ConfigurationError(f"expected {name} > 0 and finite, but got {value}")


def require_not_negative(**values: float) -> None:
    """Refuse negative settings.

    Raises:
        ConfigurationError: If one is negative, infinite or no number.
    """
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ConfigurationError(f"expected {name} >= 0 and finite, but got {value}")
