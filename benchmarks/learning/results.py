"""What is committed of the runs."""

import platform
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.learning.algorithms import PRESETS, SHARED, overruled, own
from benchmarks.learning.runs import EPOCHS, RATES, ROOT, SEEDS, TUNED, TUNING_SEED, origin

RESULT = ROOT / "benchmarks" / "learning.json"
PICTURE = ROOT / "docs" / "images" / "learning.png"
DOCUMENT = ROOT / "docs" / "algorithms.md"
COMMAND = "OMP_NUM_THREADS=1 python -m benchmarks.learning"
_PROMPTS = SHARED["data"]["prompts_per_rollout"]

GAIN = 0.05
"""Accuracy that an algorithm must gain on average to count as learning."""


def area(curve: Sequence[float]) -> float:
    """Area under a curve of equal steps, over its width: the mean height, by trapezoids.

    >>> area([0.0, 1.0, 1.0])
    0.75
    """
    return fmean((left + right) / 2 for left, right in pairwise(curve))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, least and largest of the seeds."""
    return {"mean": round(fmean(values), 4), "min": round(min(values), 4), "max": round(max(values), 4)}


def overlap(first: Mapping[str, float], second: Mapping[str, float]) -> bool:
    """Whether two spreads have a value in common."""
    return first["min"] <= second["max"] and second["min"] <= first["max"]


def failed(result: Mapping[str, Any]) -> dict[str, int]:
    """Failed verdicts of a run, by check."""
    return {check: counts["fail"] for check, counts in result["verdicts"].items() if counts["fail"]}


def summary(results: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """An algorithm's numbers over the seeds.

    Args:
        results: Its runs.
        reference: Runs of the same seeds to compare with, one by one.
    """
    clipped = [fmean(low + high for low, high in zip(r["clip_low"], r["clip_high"], strict=True)) for r in results]
    checks = sorted({check for r in results for check in failed(r)})
    return {
        "before": spread([r["sampled"][0] for r in results]),
        "after": spread([r["sampled"][-1] for r in results]),
        "area": spread([area(r["sampled"]) for r in results]),
        "greedy_before": spread([r["greedy"][0] for r in results]),
        "greedy_after": spread([r["greedy"][-1] for r in results]),
        "entropy_after": spread([r["entropy"][-1] for r in results]),
        "after_less_reference": spread(
            [r["sampled"][-1] - other["sampled"][-1] for r, other in zip(results, reference, strict=True)]
        ),
        "clipped": spread(clipped),
        "samples_ratio": round(1 + fmean(fmean(r.get("replaced", [0])) for r in results) / _PROMPTS, 3),
        "cpu_seconds": spread([r["cpu_seconds"] for r in results]),
        "failed_verdicts": {check: sum(failed(r).get(check, 0) for r in results) for check in checks},
        "verdicts": sum(counts["pass"] + counts["fail"] for r in results for counts in r["verdicts"].values()),
    }


def idle(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Algorithms that did not learn.

    Args:
        runs: Runs of each algorithm.
    """
    return [name for name, results in runs.items() if fmean(r["sampled"][-1] - r["sampled"][0] for r in results) < GAIN]


def collect(
    tuned: Mapping[str, Mapping[str, Any]],
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    again: Mapping[str, Mapping[str, Any]],
    presets: Path = PRESETS,
) -> dict[str, Any]:
    """Content of ``learning.json``.

    Args:
        tuned: Runs by learning rate.
        runs: Runs of each algorithm, a seed each.
        again: Runs with the smallest learning rate of those that did not learn.
        presets: Folder of presets.
    """
    import torch

    return {
        "what": "Sums of two numbers below 100 by a tiny Llama model of characters: accuracy on held-out sums.",
        "command": COMMAND,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "shared": SHARED,
        "origin": origin(),
        "epochs": EPOCHS,
        "seeds": list(SEEDS),
        "tuning": {
            "note": f"The learning rate was chosen for {TUNED} alone, on seed {TUNING_SEED}, which is among the seeds "
            "below; all algorithms use it. Among rates whose areas differ by less than 0.005 the smallest was taken.",
            "runs": {rate: _course(r) for rate, r in tuned.items()},
        },
        "second_look": {
            "note": f"What gained less than {GAIN}, once more with the smallest of these rates, on seed {TUNING_SEED}.",
            "learning_rate": min(RATES),
            "runs": {name: _course(r) for name, r in again.items()},
        },
        "algorithms": {
            name: {
                "settings_from": own(name, presets)[1],
                "settings": own(name, presets)[0],
                "overruled": overruled(own(name, presets)[0]),
                "summary": summary(results, runs[TUNED]),
                "runs": [
                    {"seed": seed, **{k: v for k, v in r.items() if k != "verdicts"}, "failed": failed(r)}
                    for seed, r in zip(SEEDS, results, strict=True)
                ],
            }
            for name, results in runs.items()
        },
    }


def _course(result: Mapping[str, Any]) -> dict[str, float]:
    return {"after": result["sampled"][-1], "area": round(area(result["sampled"]), 4)}
