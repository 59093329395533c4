"""Pictures as inline SVG: shapes take their colours from classes of the page's style, so that they follow its theme."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

WIDTH = 400
"""Width of a picture in its own units; a page scales it."""

_LARGEST = 1e100
"""Numbers beyond it cannot be drawn; they are left out."""


def finite(value: Any) -> float | None:
    """A number that can be drawn; None for anything else, such as the text that stands for NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _LARGEST:
        return None
    return float(value)


def number(value: float) -> str:
    """A number in few characters."""
    shown = f"{value:.3g}"
    if "e" in shown:
        digits, power = shown.split("e")
        return f"{digits}e{int(power)}"
    return shown


def element(name: str, content: str = "", **attributes: str | float) -> str:
    """An element; ``class_`` is ``class``, and ``_`` in other names is ``-``. Only the attributes are escaped."""
    pairs = (
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(_attribute(value))}"' for key, value in attributes.items()
    )
    return f"<{name}{''.join(pairs)}>{content}</{name}>"


def _attribute(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")


def text(x: float, y: float, content: str, class_: str = "", anchor: str = "start") -> str:
    """Text at a place."""
    return element("text", html.escape(content), x=x, y=y, class_=class_, text_anchor=anchor)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> str:
    """A straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def rectangle(x: float, y: float, width: float, height: float, class_: str, hint: str = "") -> str:
    """A rectangle, with a text that shows when it is pointed at."""
    content = element("title", html.escape(hint)) if hint else ""
    return element("rect", content, x=x, y=y, width=max(0.0, width), height=max(0.0, height), class_=class_)


def picture(height: float, body: Sequence[str], description: str) -> str:
    """The picture.

    Args:
        height: In its own units, of which it is `WIDTH` wide.
        body: What is in it.
        description: The same in words, for those who cannot see it.
    """
    box = f"0 0 {WIDTH} {height:g}"
    return element("svg", "".join(body), viewBox=box, role="img", aria_label=description)


@dataclass(frozen=True)
class Scale:
    """From values to places in a picture.

    Attributes:
        low: Value at the start.
        high: Value at the end, more than ``low``.
        start: Place of ``low``.
        end: Place of ``high``.
        log: Whether equal distances are equal factors; ``low`` is positive then.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The place of a value; the nearest end for one outside."""
        low, high, value = self.low, self.high, min(self.high, max(self.low, value))
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, count: int = 5, whole: bool = False) -> list[float]:
        """About ``count`` round values, whole numbers if asked for."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            every = max(1, math.ceil((last - first + 1) / (count + 1)))
            return [10.0**power for power in range(first, last + 1, every)]
        rough = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
        step = max(1.0, step) if whole else step
        first = math.ceil(self.low / step - 1e-9)
        ticks = [(first + i) * step for i in range(2 * count + 2)]
        return [tick for tick in ticks if tick <= self.high + 1e-9 * step]


def scale_over(
    values: Sequence[float], start: float, end: float, *, zero: bool = False, log: bool = False, margin: float = 0.05
) -> Scale:
    """A scale that shows all values.

    Args:
        values: At least one.
        start: Place of its low end.
        end: Place of its high end.
        zero: Show 0 too.
        log: Use a logarithmic scale where values are positive and span more than a factor of 100.
        margin: Room beside the values, as a share of their span.
    """
    low, high = min(values), max(values)
    if log and low > 0 and high / low > 100:
        return Scale(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high)), start, end, log=True)
    if zero:
        low, high = min(0.0, low), max(0.0, high)
    span = high - low
    # Numbers on the axis have three digits: values that differ by less are shown as the same.
    least = 0.05 * max(abs(low), abs(high)) or 1.0
    if span < least:
        middle = (low + high) / 2
        return Scale(middle - least / 2, middle + least / 2, start, end)
    below = 0.0 if zero and low == 0 else margin * span
    above = 0.0 if zero and high == 0 else margin * span
    return Scale(low - below, high + above, start, end)
