"""Section ``learning``: mean reward after equal samples, with the same tasks in the same order on both sides."""

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.performance.engines import engine_kind
from benchmarks.performance.paired import alternate
from benchmarks.performance.trl import picture
from benchmarks.performance.trl.cases import LEARNING, SHORT, smoke
from benchmarks.performance.trl.search import Settings
from benchmarks.performance.trl.sides import asked, best_settings, ours, theirs
from benchmarks.performance.trl.speed import NAMES

_UPDATES = 12
_LAST = 3
"""Updates whose rewards are averaged at the end."""


def measure(size: str) -> dict[str, Any]:
    """Train on both sides.

    Args:
        size: ``"full"`` or ``"smoke"``.
    """
    from grpo_lightning.demo import prepare_model

    model = str(prepare_model())
    case, near = (LEARNING, SHORT) if size == "full" else (smoke(LEARNING), smoke(SHORT))
    settings = Settings(**best_settings(near, model, size)["best"])
    spec = asked(case, model, _UPDATES if size == "full" else 2)
    with theirs(spec, settings) as trl, ours(spec) as own:
        trl.ready()
        own.ready()
        turns = alternate({"trl": trl.turn, "ours": own.turn}, spec["updates"], tell=_tell)
    return {
        "engine": engine_kind(),
        "samples_per_update": case.completions,
        "max_tokens": case.tokens,
        "learning_rate": case.learning_rate,
        "reward": {name: [round(turn["reward"], 4) for turn in found] for name, found in turns.items()},
        "length": {name: [round(turn["tokens"], 2) for turn in found] for name, found in turns.items()},
        "seconds": {name: [round(turn["seconds"], 2) for turn in found] for name, found in turns.items()},
    }


def _tell(name: str, number: int, turn: Mapping[str, Any]) -> None:
    print(f"{NAMES[name]} update {number}: reward {turn['reward']:.3f}, {turn['seconds']:.1f} s", flush=True)


def table(result: Mapping[str, Any]) -> str:
    """Markdown: rewards and time of both sides."""
    updates = len(result["reward"]["ours"])
    lines = [
        f"| Side | First update | Mean of the last {min(_LAST, updates)} of {updates} | By update | Seconds in all |",
        "|---|---|---|---|---|",
    ]
    for name, label in NAMES.items():
        rewards = result["reward"][name]
        lines.append(
            f"| {label} | {rewards[0]:.2f} | {fmean(rewards[-_LAST:]):.2f} | "
            f"{' '.join(f'{reward:.2f}' for reward in rewards)} | {sum(result['seconds'][name]):.0f} |"
        )
    lines += [
        "",
        f"{result['samples_per_update']} samples an update of at most {result['max_tokens']} tokens, learning rate "
        f"{result['learning_rate']:g}, one run of each side. The first update of each side also starts it up.",
        "",
        "![Mean reward over samples, and over minutes](images/performance_learning.png)",
    ]
    return "\n".join(lines)


def draw(result: Mapping[str, Any], folder: Path) -> None:
    """Both curves."""
    picture.draw_learning(result, NAMES, folder / "performance_learning.png")
