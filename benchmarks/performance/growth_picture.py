"""Time and memory along each size, a panel a curve, in log-log."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

PICTURE = "performance_growth.png"

_TIME, _MEMORY, _LINEAR = "#1b7f4d", "#3b5b92", "#9a9a9a"


def draw_growth(
    result: Mapping[str, Any],
    exponents: Mapping[str, Mapping[str, Mapping[str, float]]],
    parts: Mapping[str, str],
    axes_names: Mapping[str, str],
    folder: Path,
) -> None:
    """Draw it.

    Args:
        result: What `growth.measure` returned.
        exponents: What `growth.judged` says of each curve, by part and axis.
        parts: What the parts are called.
        axes_names: What the axes are called.
        folder: Where to.
    """
    from matplotlib.figure import Figure

    lines = [
        (part, name, unit, scale, colour)
        for part in result["parts"]
        for name, unit, scale, colour in (("seconds", "seconds", 1.0, _TIME), ("bytes", "MiB", 2.0**-20, _MEMORY))
        if any(name in curve for curve in result["parts"][part].values())
    ]
    figure = Figure(figsize=(12.5, 0.9 + 2.0 * len(lines)), facecolor="white", layout="constrained")
    grid = figure.subplots(len(lines), len(axes_names), squeeze=False, sharey="row")
    for row, (part, name, unit, scale, colour) in zip(grid, lines, strict=True):
        row[0].set_ylabel(f"{parts[part]}\n{unit}", fontsize=8)
        for panel, axis in zip(row, axes_names, strict=True):
            curve = result["parts"][part].get(axis)
            if curve is None or name not in curve:
                panel.set_axis_off()
                continue
            sizes, values = curve["sizes"], [scale * value for value in curve[name]]
            # A straight line of exponent 1 through the largest point, to see by how much the curve departs.
            panel.plot(sizes, [values[-1] * s / sizes[-1] for s in sizes], color=_LINEAR, linewidth=0.9, linestyle="--")
            panel.plot(sizes, values, color=colour, linewidth=1.5, marker="o", markersize=3.5)
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xticks(sizes, [str(s) for s in sizes])
            panel.minorticks_off()
            panel.set_title(f"{axes_names[axis]}: {exponents[part][axis][name]:.2f}", fontsize=8.5, loc="left")
            panel.grid(color="#ececec", linewidth=0.6)
            panel.tick_params(length=0, labelsize=7)
            for side in panel.spines.values():
                side.set_color("#cccccc")
    figure.suptitle("Growth, with fitted exponents; dashed: linear", fontsize=10.5, x=0.01, ha="left")
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / PICTURE, dpi=85, facecolor="white")
