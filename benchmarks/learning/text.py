"""Table and paragraph of the documentation."""

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.learning.results import GAIN, overlap
from benchmarks.learning.runs import TUNED, TUNING_SEED

_HEAD = (
    "Algorithm",
    "Accuracy before",
    "Accuracy after",
    f"Less {TUNED}'s",
    "Area under the curve",
    "Greedy after",
    "Entropy after",
    "Clipped",
    "Samples",
    "CPU seconds",
    "Failed verdicts",
)


def table(result: Mapping[str, Any]) -> str:
    """A row an algorithm, best first.

    Args:
        result: Content of ``learning.json``.
    """
    ordered = sorted(result["algorithms"].items(), key=lambda item: -item[1]["summary"]["after"]["mean"])
    rows = [_row(name, found["summary"]) for name, found in ordered]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (_HEAD, ("---",) * len(_HEAD), *rows))


def _row(name: str, numbers: Mapping[str, Any]) -> tuple[str, ...]:
    fails = ", ".join(f"{check}: {count}" for check, count in numbers["failed_verdicts"].items())
    return (
        f"`{name}`",
        _mean(numbers["before"]),
        _spread(numbers["after"]),
        _spread(numbers["after_less_reference"], "+.3f"),
        _spread(numbers["area"]),
        _mean(numbers["greedy_after"]),
        _mean(numbers["entropy_after"]),
        f"{numbers['clipped']['mean']:.1%}",
        f"{numbers['samples_ratio']:.2f}",
        f"{numbers['cpu_seconds']['mean']:.0f}",
        f"{fails or 'none'} of {numbers['verdicts']:,}",
    )


def _mean(values: Mapping[str, float]) -> str:
    return f"{values['mean']:.2f}"


def _spread(values: Mapping[str, float], form: str = ".2f") -> str:
    return f"{values['mean']:{form}} ({values['min']:{form}} to {values['max']:{form}})"


def paragraph(result: Mapping[str, Any]) -> str:
    """What the numbers say, and what they do not.

    Args:
        result: Content of ``learning.json``.
    """
    found = {name: a["summary"] for name, a in result["algorithms"].items()}
    best, *_, worst = sorted(found, key=lambda name: -found[name]["after"]["mean"])
    alike = [n for n in found if n != best and overlap(found[n]["after"], found[best]["after"])]
    wide = max(found, key=lambda n: found[n]["after"]["max"] - found[n]["after"]["min"])
    widest = found[wide]["after"]["max"] - found[wide]["after"]["min"]
    above = [n for n in found if found[n]["after_less_reference"]["min"] > 0]
    below = [n for n in found if found[n]["after_less_reference"]["max"] < 0]
    again = result["second_look"]
    idle = again["runs"]
    checks = sum(numbers["verdicts"] for numbers in found.values())
    fails = sum(sum(numbers["failed_verdicts"].values()) for numbers in found.values())
    parts = [
        f"Means of {len(result['seeds'])} seeds, least and largest in brackets, after {result['epochs']} rollouts of a "
        "tiny model that adds two numbers below 100. Accuracy is the exact expectation at temperature 1 on "
        f"{result['origin']['held_out']} held-out sums. All algorithms share the learning rate "
        f"{result['shared']['model']['learning_rate']:g}, which was chosen for `{TUNED}` on seed {TUNING_SEED} alone: "
        "none of the others was tuned, and what trails here may lead with settings of its own.",
        f"`{best}` ends highest at {_spread(found[best]['after'])}, `{worst}` lowest at "
        f"{_spread(found[worst]['after'])}. The spread of {_count(len(alike))} of the {len(found) - 1} others overlaps "
        f"with that of `{best}`; the seeds of `{wide}` alone differ by {widest:.2f}. Each seed has a start of "
        f"its own, the same for all algorithms: compared seed by seed, {_names(above) or 'none'} ended above `{TUNED}` "
        f"on every seed, {_names(below) or 'none'} below. Three seeds of a small task order no algorithms: they show "
        "that each runs, and how it behaves.",
    ]
    fewer = [n for n, a in result["algorithms"].items() if {"updates_per_rollout", "inner_epochs"} & {*a["overruled"]}]
    more = [n for n in found if found[n]["samples_ratio"] > 1]
    if fewer:
        parts.append(
            f"All take {result['shared']['data']['updates_per_rollout'] * result['shared']['data']['inner_epochs']} "
            f"updates on each rollout, against the presets of {_names(fewer)}, which take one."
        )
    if more:
        parts.append(
            f"{_names(more)} replaced groups of equal rewards (dynamic sampling) and so saw more samples: the column "
            "says how many, in units of the others'."
        )
    if idle:
        rate = f"{again['learning_rate']:g}"
        peer = result["tuning"]["runs"][rate]["after"]
        reached = ", ".join(f"{run['after']:.2f}" for run in idle.values())
        parts.append(
            f"{_names(idle)} gained less than {GAIN}. Once more on seed {TUNING_SEED} with a learning rate of {rate}, "
            f"where `{TUNED}` ends at {peer:.2f}, they end at {reached}."
        )
    if "gspo" in found:
        gspo = found["gspo"]
        parts.append(
            f"`gspo` has its paper's clips, which were chosen for long answers of large models; they took the gradient "
            f"from {gspo['clipped']['mean']:.0%} of the tokens (`{TUNED}`: {found[TUNED]['clipped']['mean']:.0%}), and "
            f"it went from {gspo['before']['mean']:.2f} to {gspo['after']['mean']:.2f}."
        )
    failing = [n for n in found if found[n]["failed_verdicts"]]
    said = sorted({text for n in failing for run in result["algorithms"][n]["runs"] for text in run["findings"]})
    texts = " ".join(f'"{text}"' for text in said)
    which = f", of {_names(failing)}: {texts}" if failing else "."
    parts.append(f"The doctor gave {checks:,} verdicts with power; {fails or 'none'} of them failed{which}")
    return " ".join(parts)


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _count(number: int) -> str:
    return str(number) if number else "none"


def markdown(result: Mapping[str, Any]) -> str:
    """Table, paragraph and picture.

    Args:
        result: Content of ``learning.json``.
    """
    picture = "![Accuracy on held-out sums over the rollouts, by algorithm](images/learning.png)"
    command = f"`{result['command']}` runs all again; the numbers are in `benchmarks/learning.json`."
    return "\n\n".join((table(result), f"{paragraph(result)} {command}", picture))
