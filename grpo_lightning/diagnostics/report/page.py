"""The report as one HTML page that needs nothing else."""

import html
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from grpo_lightning.diagnostics.report.curve_panels import curve_panels, part_panels
from grpo_lightning.diagnostics.report.engine_panels import (
    dial_panel,
    histogram_panel,
    marker_panel,
    sync_history_panel,
)
from grpo_lightning.diagnostics.report.panel import Panel
from grpo_lightning.diagnostics.report.sampling_panels import attribution_panel, surprisal_panels
from grpo_lightning.diagnostics.report.svg import finite
from grpo_lightning.diagnostics.report.verdict_sections import (
    checks_section,
    diagnosis_section,
    duration,
    escaped,
    headline,
)
from grpo_lightning.html_page import content_policy, filled

_SOURCES = {
    "run": "the doctor's record of the run",
    "metrics": "the run's metrics.csv; the doctor left no record",
    "trl": "TRL's log",
    "csv": "a CSV log",
}

_Z = 5.3
"""Shown as the limit where the record does not hold the one that was used."""


def render(record: Mapping[str, Any], title: str = "") -> str:
    """Write the page.

    Args:
        record: What ``doctor.json`` holds; what is missing in it is said to be missing.
        title: What the page is of.

    Returns:
        HTML without scripts, in which all text of the record is escaped.
    """
    folder = resources.files("grpo_lightning.diagnostics.report")
    style = (folder / "style.css").read_text(encoding="utf-8")
    diagnosis = record.get("diagnosis")
    return filled(
        (folder / "page.html").read_text(encoding="utf-8"),
        {
            "policy": content_policy(style=style),
            "style": style,
            "title": html.escape(title or "a run"),
            "facts": _facts(record),
            "headline": headline(record),
            "diagnosis": diagnosis_section(diagnosis),
            "checks": checks_section(record.get("checks", ())),
            "measurements": _grid(_measurements(record)),
            "curves": _grid([*curve_panels(record, _noise(record)), *part_panels(record.get("parts") or {})]),
            "provenance": _provenance(record),
        },
    )


def _facts(record: Mapping[str, Any]) -> str:
    run = record.get("run") or {}
    seconds = finite(run.get("seconds"))
    facts = {
        "model": run.get("model"),
        "epochs": run.get("epochs"),
        "updates": run.get("updates"),
        "time": None if not seconds else duration(seconds),
        "ended by": run.get("ended_by"),
        "examined": _SOURCES.get(str(record.get("source")), record.get("source")),
    }
    known = {name: value for name, value in facts.items() if value not in (None, "")}
    return "".join(f"<div><dt>{name}</dt><dd>{escaped(value)}</dd></div>" for name, value in known.items())


def _part(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = (record.get("parts") or {}).get(name)
    return part if isinstance(part, Mapping) else {}


def _noise(record: Mapping[str, Any]) -> float | None:
    return finite(_part(record, "engine").get("noise_floor"))


def _measurements(record: Mapping[str, Any]) -> list[Panel]:
    engine, sampling = _part(record, "engine"), _part(record, "sampling")
    thresholds = (record.get("settings") or {}).get("thresholds")
    limit = finite(thresholds.get("z")) if isinstance(thresholds, Mapping) else None
    return [
        histogram_panel(sampling, _noise(record)),
        dial_panel(engine),
        sync_history_panel(engine),
        marker_panel(engine),
        *surprisal_panels(sampling, limit or _Z),
        attribution_panel(sampling),
    ]


def _grid(panels: Sequence[Panel]) -> str:
    """Panels side by side; those without data come last, in few lines."""
    drawn = "".join(panel.html() for panel in panels if panel.picture)
    empty = "".join(panel.html() for panel in panels if not panel.picture)
    return f'<div class="grid">{drawn}</div>' + (f'<div class="grid bare">{empty}</div>' if empty else "")


def _provenance(record: Mapping[str, Any]) -> str:
    settings = dict(record.get("settings") or {})
    thresholds = settings.pop("thresholds", None)
    groups = {"Versions": record.get("versions"), "Thresholds": thresholds, "Settings of the doctor": settings}
    return "".join(
        f"<div><h3>{title}</h3>{_pairs(values) if isinstance(values, Mapping) and values else _unknown()}</div>"
        for title, values in groups.items()
    )


def _unknown() -> str:
    return '<p class="quiet">Not known.</p>'


def _pairs(values: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escaped(name)}</th><td>{escaped(_shown(value))}</td></tr>'
        for name, value in values.items()
    )
    return f"<table><tbody>{rows}</tbody></table>"


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {inner}" for key, inner in value.items()) or "none"
    return "none" if value is None else str(value)
