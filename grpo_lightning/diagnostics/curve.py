"""Numbers of a run over time, of bounded size."""

import math
from collections.abc import Mapping
from typing import Any


class Curve:
    """Named numbers at growing positions, thinned evenly as they become too many.

    Args:
        limit: Most points to keep. When there are more, every second one is dropped, and so is every second one that
            comes later.
    """

    def __init__(self, limit: int = 2000) -> None:
        self._limit = limit
        self._stride = 1
        self._seen = 0
        self._points: list[dict[str, float]] = []
        self._last: dict[str, float] = {}

    def add(self, position: Mapping[str, float], values: Mapping[str, float]) -> None:
        """Add a point; what is not finite is left out of it.

        Args:
            position: Where it is, for example the number of updates.
            values: The numbers there.
        """
        self._last = {**position, **{name: float(value) for name, value in values.items() if math.isfinite(value)}}
        if self._seen % self._stride == 0:
            self._points.append(self._last)
            if len(self._points) > self._limit:
                self._points = self._points[::2]
                self._stride *= 2
        self._seen += 1

    def points(self) -> list[dict[str, float]]:
        """Positions with their numbers; the newest is always among them."""
        newest = [self._last] if self._last and self._points[-1] is not self._last else []
        return [*self._points, *newest]

    def columns(self) -> dict[str, list[float | None]]:
        """Every name with one value a point, None where there is none."""
        points = self.points()
        names = dict.fromkeys(name for point in points for name in point)
        return {name: [point.get(name) for point in points] for name in names}

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"stride": self._stride, "seen": self._seen, "points": self._points, "last": self._last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._stride, self._seen = state["stride"], state["seen"]
        self._points, self._last = [dict(point) for point in state["points"]], dict(state["last"])
        if self._points and self._points[-1] == self._last:
            self._last = self._points[-1]
