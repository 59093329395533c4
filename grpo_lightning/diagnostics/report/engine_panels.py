"""What the engine serves: log-ratios against the noise floor, the sync dial, the markers."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from grpo_lightning.diagnostics.report.line_chart import Level, Line, line_chart
from grpo_lightning.diagnostics.report.panel import Panel
from grpo_lightning.diagnostics.report.svg import (
    WIDTH,
    element,
    finite,
    line,
    number,
    picture,
    rectangle,
    text,
)

_ROWS = 5
"""Most histograms in one picture."""


def histogram_panel(sampling: Mapping[str, Any], noise: float | None) -> Panel:
    """Log-ratios, one histogram for each number of updates since sampling.

    Args:
        sampling: Facts of the part ``sampling``.
        noise: The noise floor in nats; None if it is not known.
    """
    title = "Log-ratio by updates since sampling"
    healthy = (
        "at 0 updates as narrow as the noise floor; wider with each update. A histogram that stays narrow is a policy "
        "that does not move."
    )
    facts = sampling.get("log_ratio_histograms") or {}
    edges = [finite(edge) for edge in facts.get("edges") or ()]
    by_k = {k: [max(0.0, finite(c) or 0.0) for c in counts] for k, counts in (facts.get("by_k") or {}).items()}
    by_k = {k: counts for k, counts in by_k.items() if sum(counts) > 0 and len(counts) == len(edges) - 1}
    if not by_k:
        return Panel(title, healthy, empty="No log-ratios were collected: the run ended, or was read, without them.")
    return Panel(title, healthy, _histograms(edges, by_k, noise))


def _histograms(edges: Sequence[float | None], by_k: Mapping[str, Sequence[float]], noise: float | None) -> str:
    chosen = _spread(sorted(by_k, key=lambda k: (len(k), k)))
    left, right, row = 74.0, WIDTH - 12.0, 40.0
    top, bins = 26.0, len(edges) - 1
    step = (right - left) / bins
    bottom = top + row * len(chosen)
    body = [text(2, 12, "share of tokens, each row to its own height", "label")]
    words = []
    if noise is not None:
        low, high = (left + step * _place(edges, sign * noise) for sign in (-1, 1))
        width = max(2.0, high - low)
        body += [
            rectangle((low + high - width) / 2, top, width, bottom - top, "noise"),
            text((low + high) / 2, bottom + 30, f"noise floor ±{number(noise)}", "level-name", "middle"),
        ]
        words.append(f"noise floor {number(noise)} nats")
    for index, k in enumerate(chosen):
        counts, base = by_k[k], top + row * (index + 1)
        tallest = max(counts)
        for place, count in enumerate(counts):
            height = (row - 8) * count / tallest
            if height > 0.2:
                hint = f"{round(count):,} tokens from {_edge(edges[place])} to {_edge(edges[place + 1])} nats"
                body.append(rectangle(left + place * step, base - height, step * 0.92, height, "bar", hint))
        body += [
            line(left, base, right, base, "axis"),
            text(left - 8, base - 12, _updates(k), "label", "end"),
            text(left - 8, base - 1, f"{_counted(sum(counts))} tok", "tick", "end"),
        ]
        words.append(f"{_updates(k)}: {_counted(sum(counts))} tokens, widest bin holds {tallest / sum(counts):.0%}")
    middle = _place(edges, 0.0)
    body.append(text(left + middle * step, bottom + 16, "0", "tick", "middle"))
    for place in sorted({0, bins // 4, bins - bins // 4, bins}):
        if abs(place - middle) * step > 24:
            anchor = "start" if place == 0 else "end" if place == bins else "middle"
            body.append(text(left + place * step, bottom + 16, _edge(edges[place]), "tick", anchor))
    body.append(text(right, bottom + 30, "log-ratio, nats", "label", "end"))
    return picture(bottom + 36, body, "Histograms of the log-ratio. " + "; ".join(words) + ".")


def _counted(count: float) -> str:
    return f"{round(count):,}" if count < 1e6 else number(count)


def _updates(k: str) -> str:
    return f"{k} update{'' if k == '1' else 's'}" if k.isdecimal() else k


def _spread(items: Sequence[str]) -> list[str]:
    """At most `_ROWS` of them, the first and the last among them."""
    if len(items) <= _ROWS:
        return list(items)
    return [items[round(i * (len(items) - 1) / (_ROWS - 1))] for i in range(_ROWS)]


def _edge(edge: float | None) -> str:
    return "beyond" if edge is None else number(edge)


def _place(edges: Sequence[float | None], value: float) -> float:
    """Where a value lies among the edges, in bins."""
    for index, (low, high) in enumerate(pairwise(edges)):
        if low is not None and high is not None and low <= value <= high and high > low:
            return index + (value - low) / (high - low)
    known = [edge for edge in edges if edge is not None]
    return 0.0 if not known or value < known[0] else float(len(edges) - 1)


def dial_panel(engine: Mapping[str, Any]) -> Panel:
    """How much of the trained adapter the engine serves, at the last sync."""
    title = "Sync dial"
    healthy = "both needles at 1 within their error. α at 0: one version behind; β at 0: the adapter is ignored."
    canary = [entry for entry in engine.get("canary") or () if isinstance(entry, Mapping)]
    gauges = []
    for place, (name, symbol, meaning) in enumerate(
        (("alpha", "α", "of the last update"), ("beta", "β", "of the whole adapter"))
    ):
        known = [e for e in canary if finite(e.get(name)) is not None]
        if known:
            value, error = finite(known[-1][name]) or 0.0, finite(known[-1].get(f"{name}_se")) or 0.0
            gauges.append((100.0 + 200 * place, symbol, meaning, value, error, known[-1].get("version")))
    if not gauges:
        return Panel(
            title,
            healthy,
            empty="No sync could be measured: no adapter was published after an update, or its effect was below the "
            "noise floor.",
        )
    body, words = [], []
    for centre, symbol, meaning, value, error, version in gauges:
        body += _gauge(centre, symbol, meaning, value, error)
        words.append(f"{symbol} {_measured(value, error)} at version {version}")
    return Panel(title, healthy, picture(170, body, "Share that the engine serves, 1 expected: " + "; ".join(words)))


def _measured(value: float, error: float) -> str:
    """A value to the place where its error begins."""
    if not error > 0:
        return number(value)
    places = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{places}f} ± {error:.{places}f}" if places < 7 else f"{number(value)} ± {number(error)}"


def _gauge(centre: float, symbol: str, meaning: str, value: float, error: float) -> list[str]:
    """A half circle from 0 at the left over 1 at the top to 2 at the right."""
    base, radius = 106.0, 72.0

    def at(share: float, distance: float) -> tuple[float, float]:
        angle = math.pi * (1 - min(2.0, max(0.0, share)) / 2)
        return centre + distance * math.cos(angle), base - distance * math.sin(angle)

    def arc(low: float, high: float, class_: str) -> str:
        (x1, y1), (x2, y2) = at(low, radius), at(high, radius)
        return element("path", d=f"M{x1:.1f},{y1:.1f} A{radius:g},{radius:g} 0 0 1 {x2:.1f},{y2:.1f}", class_=class_)

    tip, expected = at(value, radius - 14), at(1.0, radius + 8)
    return [
        arc(0, 2, "dial"),
        arc(max(0.0, value - 2 * error), min(2.0, max(value + 2 * error, 0.0)), "dial-error") if error > 0 else "",
        line(*at(1.0, radius - 8), *expected, "axis"),
        text(expected[0], expected[1] - 5, "1", "tick", "middle"),
        text(centre - radius, base + 15, "0", "tick", "middle"),
        text(centre + radius, base + 15, "2", "tick", "middle"),
        line(centre, base, *tip, "needle"),
        element("circle", cx=centre, cy=base, r=4.5, class_="hub"),
        text(centre, base + 38, f"{symbol} = {_measured(value, error)}", "value", "middle"),
        text(centre, base + 56, f"share served {meaning}", "tick", "middle"),
    ]


def sync_history_panel(engine: Mapping[str, Any]) -> Panel:
    """The same over all syncs."""
    title = "Share served, by policy version"
    healthy = "on the line at 1. Early values of α may scatter: a small update is hard to see above the noise."
    canary = [entry for entry in engine.get("canary") or () if isinstance(entry, Mapping)]
    versions = [entry.get("version") for entry in canary]
    lines = [
        Line(symbol, versions, [entry.get(name) for entry in canary])
        for symbol, name in (("α, last update", "alpha"), ("β, whole adapter", "beta"))
    ]
    chart = line_chart(lines, x="policy version", y="share", levels=[Level("expected", 1.0)])
    return Panel(title, healthy, chart, empty="No sync could be measured.")


def marker_panel(engine: Mapping[str, Any]) -> Panel:
    """Which module families the engine applies the adapter to."""
    title = "Marker adapter by module family"
    healthy = "every slope is 1: what the marker does in the trainer, it does in the engine."
    markers = [m for m in engine.get("markers") or () if isinstance(m, Mapping)]
    if not markers:
        return Panel(title, healthy, empty="No marker was shown: they need LoRA, and an engine that loads adapters.")
    columns = 2 if len(markers) > 1 else 1
    width, height, gap = (WIDTH - 8 * (columns - 1)) / columns, 44.0, 8.0
    body, words = [], []
    for index, marker in enumerate(markers):
        x, y = (index % columns) * (width + gap), (index // columns) * (height + gap)
        slope, error = finite(marker.get("slope")), finite(marker.get("se"))
        family = str(marker.get("family", ""))
        shown = "no power" if slope is None else _measured(slope, error or 0.0)
        heat = "none" if slope is None else str(min(4, int(abs(slope - 1) * 5 + 0.5)))
        short = family if len(family) <= 20 else family[:9] + "…" + family[-9:]
        body += [
            rectangle(x, y, width, height, f"heat h{heat}", f"{family}: {shown}"),
            text(x + 10, y + 18, short, f"heat-name t{heat}"),
            text(x + 10, y + 36, shown, f"heat-value t{heat}"),
        ]
        words.append(f"{family} {shown}")
    rows = math.ceil(len(markers) / columns)
    return Panel(title, healthy, picture(rows * (height + gap) - gap, body, "Slopes, 1 expected: " + "; ".join(words)))
