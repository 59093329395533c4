"""Pictures of the comparison with TRL."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

PHASES = ("rollout", "train", "sync", "doctor", "other")
_COLOURS = {"rollout": "#3b6fb6", "train": "#1b7f4d", "sync": "#d98c21", "doctor": "#a04a8c", "other": "#b5b5b5"}
_SIDES = {"trl": "#9a9a9a", "ours": "#1b7f4d"}
_GRID = "#ececec"


def draw_speed(result: Mapping[str, Any], names: Mapping[str, str], path: Path) -> None:
    """Bars: trained samples a second, and the phases of a step.

    Args:
        result: What the section measured.
        names: What the sides are called.
        path: Where to.
    """
    from matplotlib.figure import Figure

    cases = result["cases"]
    figure = Figure(figsize=(11, 4.2), facecolor="white", layout="constrained")
    left, right = figure.subplots(1, 2)
    width = 0.38
    for offset, (side, colour) in zip((-width / 2, width / 2), _SIDES.items(), strict=True):
        found = [case["samples_per_second"][side] for case in cases.values()]
        places = [place + offset for place in range(len(cases))]
        middle = [one["median"] for one in found]
        reach = [
            [m - one["min"] for m, one in zip(middle, found, strict=True)],
            [one["max"] - m for m, one in zip(middle, found, strict=True)],
        ]
        left.bar(places, middle, width, color=colour, label=names[side], yerr=reach, capsize=3, ecolor="#444444")
        for place, one in zip(places, found, strict=True):
            left.annotate(
                f"{one['median']:.2f}",
                (place, one["max"]),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                fontsize=9,
            )
    titles = [f"{name}\n{case['speedup']['median']:.1f} times" for name, case in cases.items()]
    left.set_xticks(range(len(cases)), titles)
    left.set_title("Trained samples a second (median, least and largest)", fontsize=10.5, loc="left")
    left.legend(frameon=False, fontsize=9)
    rows = [(name, side) for name in cases for side in _SIDES]
    for place, (name, side) in enumerate(rows):
        begin = 0.0
        for phase in PHASES:
            seconds = max(0.0, cases[name]["phases"][side].get(phase, 0.0))
            right.barh(place, seconds, left=begin, color=_COLOURS[phase], label=phase if place == 1 else None)
            begin += seconds
        right.annotate(
            f"{begin:.1f} s", (begin, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9
        )
    right.set_yticks(range(len(rows)), [f"{name}: {names[side]}" for name, side in rows])
    right.invert_yaxis()
    right.margins(x=0.12)
    right.set_title("Seconds of a step by phase (medians)", fontsize=10.5, loc="left")
    right.legend(frameon=False, fontsize=9, loc="lower right")
    _finish(figure, (left, right), path)


def draw_learning(result: Mapping[str, Any], names: Mapping[str, str], path: Path) -> None:
    """Curves: mean reward of each update.

    Args:
        result: What the section measured.
        names: What the sides are called.
        path: Where to.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.8), facecolor="white", layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for side, colour in _SIDES.items():
        rewards, samples = result["reward"][side], result["samples_per_update"]
        counts = [samples * number for number in range(len(rewards))]
        left.plot(counts, rewards, color=colour, marker="o", markersize=3.5, label=names[side])
        begun = [0.0]
        for seconds in result["seconds"][side][:-1]:
            begun.append(begun[-1] + seconds)
        right.plot([second / 60 for second in begun], rewards, color=colour, marker="o", markersize=3.5)
    left.set_title("Mean reward over the samples trained on before", fontsize=10.5, loc="left")
    right.set_title("The same over minutes of each side's own time", fontsize=10.5, loc="left")
    left.legend(frameon=False, fontsize=9)
    _finish(figure, (left, right), path)


def _finish(figure: Any, axes: tuple[Any, ...], path: Path) -> None:
    for one in axes:
        one.grid(color=_GRID, linewidth=0.6)
        one.set_axisbelow(True)
        one.tick_params(length=0, labelsize=9)
        for side in one.spines.values():
            side.set_color("#cccccc")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=85, facecolor="white")
