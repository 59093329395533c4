"""Where tokens come from: surprisal against expectation, and what the mismatch is made of."""

from collections.abc import Mapping
from typing import Any

from grpo_lightning.diagnostics.report.line_chart import Level, Line, line_chart
from grpo_lightning.diagnostics.report.panel import Panel
from grpo_lightning.diagnostics.report.svg import WIDTH, finite, number, picture, rectangle, text

_SOURCES = {
    "noise": "numeric noise",
    "staleness": "staleness",
    "temperature": "temperature or raw",
    "truncation": "truncation",
    "retokenisation": "retokenisation",
    "missing": "missing values",
    "unexplained": "unexplained",
}


def surprisal_panels(sampling: Mapping[str, Any], limit: float) -> list[Panel]:
    """How surprising the sampled tokens are, observed against expected, and the sum of the difference.

    Args:
        sampling: Facts of the part ``sampling``.
        limit: Standard errors that are too many.
    """
    rows = [row for row in sampling.get("surprisal") or () if isinstance(row, Mapping)]
    updates = [row.get("update") for row in rows]
    both = [Line(name, updates, [row.get(name) for row in rows]) for name in ("observed", "expected")]
    sums = [Line("z", updates, [row.get("z") for row in rows])]
    empty = "No surprisal was collected: it needs the policy's entropy at each sampled token."
    return [
        Panel(
            "Surprisal of sampled tokens",
            "observed follows expected. Below: sampling is sharper than the policy; above: foreign tokens.",
            line_chart(both, x="update", y="nats/token"),
            empty,
        ),
        Panel(
            "Surprisal, difference summed up",
            f"z wanders between the limits at ±{number(limit)}.",
            line_chart(
                sums,
                x="update",
                y="standard errors",
                levels=[Level(f"+{number(limit)}", limit), Level(f"−{number(limit)}", -limit)],
            ),
            empty,
        ),
    ]


def attribution_panel(sampling: Mapping[str, Any]) -> Panel:
    """What the squared difference between sampler and trainer consists of, as a stacked bar."""
    title = "Mismatch between sampler and trainer, by source"
    healthy = "all of it is numeric noise; with declared lag some is staleness."
    found = sampling.get("attribution") or {}
    shares = {name: max(0.0, finite(found.get(key)) or 0.0) for key, name in _SOURCES.items()}
    total = sum(shares.values())
    if total <= 0:
        return Panel(
            title,
            healthy,
            empty="The difference was not split: it needs tokens with the engine's logprobs and rescored ones.",
        )
    body, x = [], 0.0
    words = []
    for place, (name, share) in enumerate(shares.items(), start=1):
        part, width = share / total, share / total * WIDTH
        body.append(rectangle(x, 4, width, 34, f"part p{place}", f"{name}: {part:.1%}"))
        if width > 44:
            body.append(text(x + width / 2, 26, f"{part:.0%}", f"part-value v{place}", "middle"))
        row, column = divmod(place - 1, 2)
        left, top = column * WIDTH / 2, 62 + row * 21
        body += [
            rectangle(left, top - 10, 12, 12, f"part p{place}"),
            text(left + 19, top, f"{name} {part:.1%}", "label"),
        ]
        words.append(f"{name} {part:.1%}")
        x += width
    return Panel(title, healthy, picture(136, body, "Shares of the mean square difference: " + "; ".join(words)))
