"""Curves over updates or epochs."""

from collections.abc import Sequence
from dataclasses import dataclass

from grpo_lightning.diagnostics.report.svg import (
    WIDTH,
    Scale,
    element,
    finite,
    line,
    number,
    picture,
    scale_over,
    text,
)

_HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 236.0, 46.0, 12.0, 26.0, 38.0
_DOTS = 40
"""Up to this many points are shown each."""


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        name: What it is.
        xs: Its positions, ascending.
        ys: Its values, None where there is none.
    """

    name: str
    xs: Sequence[float | None]
    ys: Sequence[float | None]

    def points(self) -> list[tuple[float, float]]:
        """Positions and values where both can be drawn."""
        pairs = ((finite(x), finite(y)) for x, y in zip(self.xs, self.ys, strict=False))
        return [(x, y) for x, y in pairs if x is not None and y is not None]


@dataclass(frozen=True)
class Level:
    """A horizontal line to compare with.

    Attributes:
        name: What it is.
        value: Where it is.
    """

    name: str
    value: float


def line_chart(
    lines: Sequence[Line],
    *,
    x: str,
    y: str,
    levels: Sequence[Level] = (),
    zero: bool = False,
    log: bool = False,
) -> str:
    """Curves in one picture; empty if there is nothing to draw.

    Args:
        lines: The curves, at most five.
        x: What the positions are; whole numbers.
        y: What the values are, with their unit.
        levels: Values to compare with.
        zero: Show the value 0 too.
        log: Use a logarithmic scale if the values ask for it.
    """
    drawn = [(curve, curve.points()) for curve in lines]
    drawn = [(curve, points) for curve, points in drawn if points]
    if not drawn:
        return ""
    xs = [x for _, points in drawn for x, _ in points]
    ys = [y for _, points in drawn for _, y in points]
    across = scale_over(xs, _LEFT, WIDTH - _RIGHT, margin=0.0)
    up = scale_over([*ys, *(level.value for level in levels)], _HEIGHT - _BOTTOM, _TOP, zero=zero, log=log)
    body = [*_axes(across, up, x, y), *_levels(levels, up)]
    for place, (_, points) in enumerate(drawn, start=1):
        body += _curve(points, across, up, place)
    names = [curve.name for curve, _ in drawn]
    if len(names) > 1:
        body += _legend(names)
    return picture(_HEIGHT, body, _words(names, [points for _, points in drawn], x, y, levels))


def _axes(across: Scale, up: Scale, x: str, y: str) -> list[str]:
    bottom = up.start
    body = []
    for tick in up.ticks():
        body += [
            line(across.start, up(tick), across.end, up(tick), "grid-line"),
            text(across.start - 6, up(tick) + 4, number(tick), "tick", "end"),
        ]
    for tick in across.ticks(count=5, whole=True):
        body.append(
            text(across(tick), bottom + 16, f"{tick:.0f}" if abs(tick) < 1e6 else number(tick), "tick", "middle")
        )
    return [
        *body,
        line(across.start, bottom, across.end, bottom, "axis"),
        text(across.end, bottom + 32, x, "label", "end"),
        text(2, 12, y, "label"),
    ]


def _levels(levels: Sequence[Level], up: Scale) -> list[str]:
    body = []
    for level in levels:
        place = up(level.value)
        body += [
            line(_LEFT, place, WIDTH - _RIGHT, place, "level"),
            text(WIDTH - _RIGHT, place - 4, level.name, "level-name", "end"),
        ]
    return body


def _curve(points: Sequence[tuple[float, float]], across: Scale, up: Scale, place: int) -> list[str]:
    # Where nothing was measured the curve goes on to the next measurement.
    places = [(across(x), up(y)) for x, y in points]
    body = [element("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in places), class_=f"curve c{place}")]
    if len(places) <= _DOTS:
        body += [element("circle", cx=x, cy=y, r=2.2, class_=f"dot c{place}") for x, y in places]
    return body


def _legend(names: Sequence[str]) -> list[str]:
    """From the right end of the top line to the left: the unit stands at its left end."""
    body, right = [], WIDTH - _RIGHT
    for place, name in reversed(list(enumerate(names, start=1))):
        left = right - 6.8 * len(name)
        body += [
            text(left, 12, name, "label"),
            line(left - 22, 8, left - 5, 8, f"curve c{place}"),
        ]
        right = left - 36
    return body


def _words(
    names: Sequence[str], curves: Sequence[Sequence[tuple[float, float]]], x: str, y: str, levels: Sequence[Level]
) -> str:
    said = []
    for name, points in zip(names, curves, strict=True):
        (first, begin), (last, end) = points[0], points[-1]
        values = [value for _, value in points]
        said.append(
            f"{name} from {number(begin)} at {x} {number(first)} to {number(end)} at {x} {number(last)}, "
            f"between {number(min(values))} and {number(max(values))}"
        )
    said += [f"{level.name} at {number(level.value)}" for level in levels]
    return f"{y} over {x}s: {'; '.join(said)}."
