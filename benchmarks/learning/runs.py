"""All runs, resumable: each has its file."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.learning.algorithms import ALGORITHMS, PRESETS, Settings, combined, own
from benchmarks.learning.start import MODEL, Start, make_start
from benchmarks.learning.sums import split

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "runs" / "learning"
SEEDS, EPOCHS, HELD_OUT = (0, 1, 2), 30, 500
RATES = (1e-4, 2e-4, 3e-4, 5e-4)
"""Learning rates that were tried."""
TUNED, TUNING_SEED = "grpo", 0
"""What they were tried with."""


class Store:
    """Results so far, a file each, used again only for the very same question.

    Args:
        folder: Where they are kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, key: str, question: dict[str, Any]) -> dict[str, Any] | None:
        """The result, if this question was asked before.

        Args:
            key: Name of the file.
            question: All that the result depends on, as plain values.
        """
        path = self._folder / f"{key}.json"
        if not path.is_file():
            return None
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found["result"] if found["question"] == question else None

    def add(self, key: str, question: dict[str, Any], result: dict[str, Any]) -> None:
        """Keep a result; whole or not at all."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{key}.json"
        path.with_suffix(".tmp").write_text(json.dumps({"question": question, "result": result}), encoding="utf-8")
        path.with_suffix(".tmp").replace(path)


def question(settings: Settings, seed: int, epochs: int) -> dict[str, Any]:
    """All that a result depends on, beside the code.

    Args:
        settings: Of module and data module.
        seed: The seed.
        epochs: Rollouts.
    """
    asked = {"settings": settings, "seed": seed, "epochs": epochs, **origin()}
    plain: dict[str, Any] = json.loads(json.dumps(asked))
    return plain


def origin() -> dict[str, Any]:
    """What the supervised start depends on, beside the seed."""
    return {"start": asdict(Start()), "transformer": MODEL, "held_out": HELD_OUT}


def start_of(seed: int, folder: Path) -> Path:
    """The supervised start of a seed, made where it is not there yet.

    Args:
        seed: The seed.
        folder: Where results are kept.
    """
    digest = hashlib.sha256(json.dumps(origin(), sort_keys=True).encode()).hexdigest()[:8]
    path = folder / f"start-{seed}-{digest}"
    if not path.is_dir():
        train, held_out = split(HELD_OUT, seed)
        made = path.with_suffix(".tmp")
        shutil.rmtree(made, ignore_errors=True)
        steps = make_start(made, train, held_out, seed)
        made.replace(path)
        print(f"start of seed {seed}: {steps} supervised steps", flush=True)
    return path


def run_one(key: str, settings: Settings, seed: int, epochs: int, folder: Path) -> dict[str, Any]:
    """A result, from its file or from a run.

    Args:
        key: Name of the file.
        settings: Of module and data module.
        seed: The seed.
        epochs: Rollouts.
        folder: Where results are kept.
    """
    store, asked = Store(folder), question(settings, seed, epochs)
    result = store.get(key, asked)
    if result is None:
        from benchmarks.learning.run import train

        start = start_of(seed, folder)
        sums, held_out = split(HELD_OUT, seed)
        with tempfile.TemporaryDirectory(prefix="learning-") as temporary:
            result = train(settings, start, sums, held_out, seed=seed, epochs=epochs, folder=Path(temporary))
        store.add(key, asked, result)
    failed = sum(counts["fail"] for counts in result["verdicts"].values())
    print(
        f"{key:<20} {result['sampled'][0]:.3f} -> {result['sampled'][-1]:.3f}, greedy {result['greedy'][-1]:.3f}, "
        f"entropy {result['entropy'][-1]:.3f}, {result['cpu_seconds']} s, failed verdicts: {failed}",
        flush=True,
    )
    return result


def tune(folder: Path, presets: Path = PRESETS) -> dict[str, dict[str, Any]]:
    """GRPO's results by learning rate, of one seed.

    Args:
        folder: Where results are kept.
        presets: Folder of presets.
    """
    found = {}
    for rate in RATES:
        settings = combined(own(TUNED, presets)[0])
        settings["model"]["learning_rate"] = rate
        found[f"{rate:g}"] = run_one(f"tune-{rate:g}", settings, TUNING_SEED, EPOCHS, folder)
    return found


def run_all(folder: Path, presets: Path = PRESETS, only: Sequence[str] = ()) -> dict[str, list[dict[str, Any]]]:
    """Results of each algorithm, a seed each; seeds come first, so that an early end leaves whole comparisons.

    Args:
        folder: Where results are kept.
        presets: Folder of presets.
        only: Algorithms; all by default.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in only or ALGORITHMS}
    for seed in SEEDS:
        for name, results in found.items():
            results.append(run_one(f"{name}-{seed}", combined(own(name, presets)[0]), seed, EPOCHS, folder))
    return found


def second_look(names: Sequence[str], folder: Path, presets: Path = PRESETS) -> dict[str, dict[str, Any]]:
    """Results with the smallest learning rate, of one seed: whether what did not learn can.

    Args:
        names: Algorithms.
        folder: Where results are kept.
        presets: Folder of presets.
    """
    found = {}
    for name in names:
        settings = combined(own(name, presets)[0])
        settings["model"]["learning_rate"] = min(RATES)
        found[name] = run_one(f"second-{name}", settings, TUNING_SEED, EPOCHS, folder)
    return found
