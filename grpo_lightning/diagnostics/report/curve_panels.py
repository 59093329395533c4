"""The run's curves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grpo_lightning.diagnostics.report.line_chart import Level, Line, line_chart
from grpo_lightning.diagnostics.report.panel import Panel
from grpo_lightning.diagnostics.report.svg import finite

_CHARTS: tuple[tuple[str, str, dict[str, str], str], ...] = (
    ("Reward", "mean reward", {"reward/mean": "reward"}, "rises, or stays high on a solved task."),
    (
        "Completion length",
        "tokens",
        {"completion/length_mean": "mean", "completion/length_max": "longest"},
        "settles below the limit; pinned at it, every completion is cut off.",
    ),
    ("Entropy", "nats/token", {"policy/entropy": "entropy"}, "falls slowly; a drop to 0 ends exploration."),
    (
        "Clip fraction",
        "share of tokens",
        {"ppo/clip_fraction_low": "low", "ppo/clip_fraction_high": "high"},
        "0 on the first update after sampling, some percent after several.",
    ),
    (
        "PPO ratio, std",
        "std of the ratio",
        {"ppo/ratio_std": "std"},
        "the noise floor on the first update after sampling, more on later ones.",
    ),
    (
        "Sampler/trainer mismatch",
        "nats/token",
        {"mismatch/logprob_abs_mean": "mean difference"},
        "level from the start to the end; growth points to the sync.",
    ),
    (
        "KL divergence",
        "nats/token",
        {"ppo/kl_k3": "from sampling", "policy/kl_reference": "from reference"},
        "from sampling: small; from the reference: grows as the policy learns, from 0.",
    ),
    ("Gradient norm", "before clipping", {"policy/grad_norm": "norm"}, "finite; 0 only where all rewards are equal."),
)
"""Title, unit, curves by name of the metric, what is healthy."""

_FROM_ZERO = ("Completion length", "Entropy", "Clip fraction", "Gradient norm")
_LOG = ("PPO ratio, std", "Sampler/trainer mismatch", "KL divergence", "Gradient norm")


@dataclass(frozen=True)
class _Series:
    """How a series of one of the doctor's parts is shown: its key, what is shown of each row, and what is healthy."""

    key: str
    title: str
    unit: str
    fields: Mapping[str, str]
    healthy: str
    x: str = "update"
    log: bool = False


_SERIES = (
    _Series(
        "ascent",
        "Change of the loss by a step",
        "loss",
        {"observed": "observed", "predicted": "predicted"},
        "observed has the predicted sign and about its size.",
    ),
    _Series(
        "closed_form",
        "Gradient against its closed form",
        "relative error",
        {"error": "error"},
        "far below 0.001: rounding alone.",
        log=True,
    ),
    _Series(
        "steps",
        "Size of the steps",
        "of what the learning rate stands for",
        {"relative": "size"},
        "about 1 at first, then less; near 0 nothing moves.",
    ),
    _Series(
        "rollouts",
        "Groups and completions",
        "share",
        {"without_variance": "equal rewards", "truncated": "cut off", "distinct": "distinct"},
        "few groups with equal rewards, few completions cut off, most of them distinct.",
        x="number",
    ),
)


def curve_panels(record: Mapping[str, Any], noise: float | None) -> list[Panel]:
    """The run's curves, by update where they are known by update, else by epoch.

    Args:
        record: What ``doctor.json`` holds.
        noise: The noise floor in nats; None if it is not known.
    """
    panels = []
    for title, unit, names, healthy in _CHARTS:
        x, lines = _lines(record, names)
        levels = [Level("noise floor", noise)] if noise and title.startswith("Sampler") else []
        chart = line_chart(lines, x=x, y=unit, levels=levels, zero=title in _FROM_ZERO, log=title in _LOG)
        panels.append(Panel(title, healthy, chart, f"Nothing was logged under {' or '.join(names)}."))
    return panels


def part_panels(parts: Mapping[str, Any]) -> list[Panel]:
    """Further series that parts of the doctor collected over the updates; those that are not known too.

    Args:
        parts: Facts of the parts, by name.
    """
    known = {series.key: series for series in _SERIES}
    panels = []
    for part, facts in parts.items():
        for name, rows in facts.items() if isinstance(facts, Mapping) else ():
            # The surprisal has pictures of its own.
            if not isinstance(rows, list) or name == "surprisal":
                continue
            points = [row for row in rows if isinstance(row, Mapping)]
            series = known.get(name) or _unknown(part, name, points)
            xs = [row.get(series.x) for row in points]
            lines = [Line(label, xs, [row.get(key) for row in points]) for key, label in series.fields.items()]
            x = "rollout" if series.x == "number" else series.x
            chart = line_chart(lines, x=x, y=series.unit, zero=not series.log, log=series.log)
            if chart:
                panels.append(Panel(series.title, series.healthy, chart))
    return panels


def _unknown(part: str, name: str, points: Sequence[Mapping[str, Any]]) -> _Series:
    keys = dict.fromkeys(key for row in points for key, value in row.items() if finite(value) is not None)
    shown = [key for key in keys if key not in ("update", "se")][:5]
    healthy = "no level fits every run; its check's verdict above judges it."
    return _Series(name, f"{part.capitalize()}: {name.replace('_', ' ')}", "", {key: key for key in shown}, healthy)


def _lines(record: Mapping[str, Any], names: Mapping[str, str]) -> tuple[str, Sequence[Line]]:
    curves = record.get("curves") or {}
    for group, x in (("updates", "update"), ("epochs", "epoch")):
        columns = curves.get(group) or {}
        known = {key: label for key, label in names.items() if any(finite(v) is not None for v in columns.get(key, ()))}
        if known:
            return x, [Line(label, columns[x], columns[key]) for key, label in known.items()]
    return "update", []
