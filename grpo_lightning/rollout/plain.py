"""Values that every file format and weights-only checkpoints can hold."""

from collections.abc import Mapping
from typing import Any


def plain(value: Any) -> Any:
    """The value with everything that is no number, text, list or mapping replaced by its ``repr``."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return repr(value)
