"""The course of learning, a panel an algorithm."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.learning.runs import TUNED

_OWN, _OTHER = "#1b7f4d", "#9a9a9a"
_COLUMNS = 5


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw it.

    Args:
        result: Content of ``learning.json``.
        path: Where to.
    """
    from matplotlib.figure import Figure

    curves = {name: [run["sampled"] for run in found["runs"]] for name, found in result["algorithms"].items()}
    lines = math.ceil(len(curves) / _COLUMNS)
    figure = Figure(figsize=(11, 0.8 + 1.9 * lines), facecolor="white", layout="constrained")
    grid = figure.subplots(lines, _COLUMNS, sharex=True, sharey=True, squeeze=False)
    panels = [axes for row in grid for axes in row]
    for axes in panels[len(curves) :]:
        axes.set_axis_off()
    reference = _mean(curves[TUNED])
    for axes, (name, seeds) in zip(panels, curves.items(), strict=False):
        steps = range(len(seeds[0]))
        axes.plot(steps, reference, color=_OTHER, linewidth=1, linestyle="--")
        axes.fill_between(steps, list(map(min, *seeds)), list(map(max, *seeds)), color=_OWN, alpha=0.22, linewidth=0)
        axes.plot(steps, _mean(seeds), color=_OWN, linewidth=1.6)
        axes.set_title(name.replace("_", " "), fontsize=9.5, loc="left")
        axes.grid(color="#ececec", linewidth=0.6)
        axes.tick_params(length=0, labelsize=8)
        for side in axes.spines.values():
            side.set_color("#cccccc")
    figure.suptitle(
        f"Accuracy on held-out sums over {result['epochs']} rollouts: mean and range of {len(result['seeds'])} seeds; "
        f"dashed: mean of {TUNED}",
        fontsize=10.5,
        x=0.01,
        ha="left",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=85, facecolor="white")


def _mean(curves: list[list[float]]) -> list[float]:
    return [sum(values) / len(values) for values in zip(*curves, strict=True)]
