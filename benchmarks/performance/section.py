"""What a part of the benchmark is: a module with these functions."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, cast

SIZES = ("full", "smoke")
"""``smoke`` is as small as it gets: it shows that a section runs, its numbers mean nothing."""


class Section(Protocol):
    """A module that measures something.

    It may also have ``headline(result) -> dict[str, float]``, single numbers for the top of ``performance.json``, and
    ``draw(result, folder) -> None``, which makes pictures that its table shows.
    """

    def measure(self, size: str) -> dict[str, Any]:
        """Measure.

        Args:
            size: One of `SIZES`.

        Returns:
            What JSON can hold.
        """
        ...

    def table(self, result: Mapping[str, Any]) -> str:
        """Markdown of what `measure` returned."""
        ...


def headline(section: Section, result: Mapping[str, Any]) -> dict[str, float]:
    """Single numbers of a section, if it declares any."""
    found: Callable[[Mapping[str, Any]], dict[str, float]] | None = getattr(section, "headline", None)
    return {} if found is None else found(result)


def draw(section: Section, result: Mapping[str, Any], folder: Path) -> None:
    """The pictures of a section, if it has any."""
    found: Callable[[Mapping[str, Any], Path], None] | None = getattr(section, "draw", None)
    if found is not None:
        found(result, folder)


def of(module: ModuleType) -> Section:
    """A module as a section; its functions are checked where they are called."""
    return cast(Section, module)
