"""Injected fault against named cause, as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo_lightning.diagnostics.causes import ORDER

_RIGHT, _WRONG, _EXPECTED = "#1b7f4d", "#c0392b", "#d9efe3"
_NOTHING = "nothing"


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw the matrix.

    Args:
        result: Content of ``fault_matrix.json``.
        path: Where to.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    faults = sorted(result["faults"], key=lambda f: (ORDER[f["expected"]], f["name"]))
    columns = _columns(faults)
    left, right, top, bottom = 3.6, 0.45, 2.0, 0.65
    width, height = left + 0.24 * len(columns) + right, top + 0.2 * len(faults) + bottom
    figure = Figure(figsize=(width, height), facecolor="white")
    box = (left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height)
    axes = figure.add_axes(box)
    axes.set_facecolor("white")
    for row, fault in enumerate(faults):
        for cause in fault["accepted"]:
            if cause in columns:
                axes.add_patch(Rectangle((columns.index(cause) - 0.5, row - 0.5), 1, 1, color=_EXPECTED, lw=0))
        named = fault["named_correctly"]
        axes.scatter(
            columns.index(fault["got"] or _NOTHING),
            row,
            s=52,
            marker=("D" if fault["refused_by_guard"] else "s") if named else "X",
            color=_RIGHT if named else _WRONG,
            zorder=3,
        )
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(faults) - 0.5, -0.5)
    axes.set_xticks(range(len(columns)), columns, rotation=60, ha="left", rotation_mode="anchor", fontsize=8.5)
    axes.set_yticks(range(len(faults)), [_label(fault) for fault in faults], fontsize=8.5)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set_axisbelow(True)
    axes.grid(color="#ececec", linewidth=0.6)
    for side in axes.spines.values():
        side.set_color("#cccccc")
    named_right = sum(fault["named_correctly"] for fault in faults)
    figure.text(
        0.15 / width,
        1 - 0.15 / height,
        f"{named_right} of {len(faults)} injected faults: right cause named in time",
        fontsize=14,
        weight="bold",
        va="top",
    )
    healthy = f"{result['false_alarms']} false alarms in {result['healthy_checks']:,} healthy optimizer steps"
    figure.text(
        0.15 / width,
        0.12 / height,
        "Rows: what was put in, with its deadline. Columns: what the doctor named. Shaded: a right answer. "
        "Square: right and in time. Diamond: refused by a guard of the code itself. "
        f"Cross: wrong, late or missed.\n{healthy} "
        f"({len(result['healthy_configs'])} configurations).",
        fontsize=8.5,
        va="bottom",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, facecolor="white")


def _columns(faults: Sequence[dict[str, Any]]) -> list[str]:
    """Causes that were expected or named, in causal order, then what has no name."""
    causes = {cause for fault in faults for cause in (fault["expected"], fault["got"]) if cause}
    missed = [_NOTHING] if any(not fault["got"] for fault in faults) else []
    return sorted(causes, key=ORDER.__getitem__) + missed


def _label(fault: dict[str, Any]) -> str:
    return f"{fault['name'].replace('_', ' ')}  ({fault['deadline']})"
