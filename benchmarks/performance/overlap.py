"""Section ``overlap``: what an epoch takes with and without a rollout that is sampled ahead, one core for each side.

Run: python -m benchmarks.performance.overlap --ahead 0 --size smoke      one run, as `measure` starts it
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.performance.engines import make_engine
from benchmarks.performance.paired import shown, spread

SIZES: dict[str, dict[str, Any]] = {
    "full": {"pairs": 5, "epochs": 6, "prompts": 8, "samples": 8, "tokens": 24, "micro_batches": 2},
    "smoke": {"pairs": 1, "epochs": 4, "prompts": 2, "samples": 2, "tokens": 4, "micro_batches": 1},
}
"""Of the epochs the first is not counted, whose rollout nothing overlaps and for which the engine starts, nor the last,
beside which nothing is sampled."""

_DTYPE: Any = "bfloat16"


def trainer_core() -> int:
    """The first of the cores that this process may use; the engine gets the second.

    Raises:
        RuntimeError: If there is only one.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise RuntimeError(f"expected two cores, one for the trainer and one for the engine, but got {cores}")
    return cores[0]


def engine_core() -> int:
    """The core of the engine."""
    trainer_core()
    return sorted(os.sched_getaffinity(0))[1]


def descendants(pid: int) -> list[int]:
    """Processes that a process has started, and theirs.

    Args:
        pid: The process.
    """
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name, in parentheses, may hold anything.
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found, waiting = [], [pid]
    while waiting:
        children = parents.get(waiting.pop(), [])
        found += children
        waiting += children
    return found


def pin(pids: Sequence[int], core: int) -> None:
    """Keep all threads of some processes on one core.

    Args:
        pids: The processes.
        core: The core.
    """
    for pid in pids:
        try:
            for thread in os.listdir(f"/proc/{pid}/task"):
                os.sched_setaffinity(int(thread), {core})
        except OSError:
            continue


def train(ahead: int, size: str) -> list[dict[str, float]]:
    """One run, in a process of its own.

    Args:
        ahead: ``rollouts_ahead``.
        size: One of `SIZES`.

    Returns:
        Of each counted epoch its wall time and what its phases took, in seconds.
    """
    import torch
    from lightning.pytorch import Callback, Trainer

    from grpo_lightning import GRPOModule, RolloutDataModule
    from grpo_lightning.demo import prepare_model
    from grpo_lightning.rewards import last_number_correct
    from grpo_lightning.tasks import SumTasks

    own, other = trainer_core(), engine_core()
    torch.set_num_threads(1)
    shape = SIZES[size]

    class Watch(Callback):
        """Pins both sides once the engine is up, and notes the epochs."""

        def __init__(self) -> None:
            self.ends: list[float] = []
            self.metrics: list[dict[str, float]] = []

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            pin(descendants(os.getpid()), other)
            pin([os.getpid()], own)

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.ends.append(time.perf_counter())
            self.metrics.append(pl_module.epoch_metrics())

    watch = Watch()
    data = RolloutDataModule(
        SumTasks(20),
        rewards=last_number_correct,
        engine=make_engine(_DTYPE),
        prompts_per_rollout=shape["prompts"],
        samples_per_prompt=shape["samples"],
        max_tokens=shape["tokens"],
        max_prompt_tokens=256,
        rollouts_ahead=ahead,
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=shape["epochs"],
            accumulate_grad_batches=shape["micro_batches"],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            callbacks=[watch],
        )
        # The correction costs a forward pass of the trainer, so both sides have it.
        trainer.fit(GRPOModule(str(prepare_model()), dtype=_DTYPE, correction="tis_token"), data)
    phases = {
        "rollout": "time/rollout_sampling_seconds",
        "waited": "time/rollout_seconds",
        "train": "time/train_seconds",
        "rescore": "time/rescore_seconds",
        "sync": "time/sync_seconds",
        "doctor": "time/doctor_seconds",
    }
    return [
        {
            "epoch": watch.ends[i] - watch.ends[i - 1],
            **{phase: watch.metrics[i][name] for phase, name in phases.items()},
        }
        for i in range(1, shape["epochs"] - 1)
    ]


def overlap(epoch: Mapping[str, float]) -> float:
    """An epoch over the longer of its rollout and its training, of which the pass over the rollout is part.

    >>> overlap({"epoch": 11.0, "rollout": 10.0, "train": 6.0, "rescore": 2.0})
    1.1
    """
    return epoch["epoch"] / max(epoch["rollout"], epoch["train"] + epoch["rescore"])


def _run(ahead: int, size: str) -> list[dict[str, float]]:
    """One run in a process of its own: threads and affinity are those of a process."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "epochs.json"
        command = [sys.executable, "-m", "benchmarks.performance.overlap", "--ahead", str(ahead), "--size", size]
        subprocess.run([*command, "--json", str(file)], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        found: list[dict[str, float]] = json.loads(file.read_text())
    return found


def measure(size: str) -> dict[str, Any]:
    """Runs with and without looking ahead, in turns.

    Args:
        size: One of `SIZES`.
    """
    pairs = []
    for number in range(SIZES[size]["pairs"]):
        pair = {"0": _run(0, size), "1": _run(1, size)}
        pairs.append(pair)
        print(f"pair {number + 1}: {_ratios(pair)}", flush=True)
    return {"shape": SIZES[size], "pairs": pairs}


def _ratios(pair: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, float]:
    """Of one pair the medians over its epochs."""
    alone, ahead = pair["0"], pair["1"]
    together = statistics.median(epoch["epoch"] for epoch in ahead)
    longer = max(
        statistics.median(epoch["rollout"] for epoch in alone),
        statistics.median(epoch["train"] + epoch["rescore"] for epoch in alone),
    )
    return {
        "overlap_ratio": statistics.median(map(overlap, ahead)),
        "overlap_ratio_alone": together / longer,
        "overlap_ratio_without": statistics.median(map(overlap, alone)),
        "overlap_speedup": statistics.median(epoch["epoch"] for epoch in alone) / together,
    }


def headline(result: Mapping[str, Any]) -> dict[str, float]:
    """Medians over the pairs.

    ``overlap_ratio`` is an overlapped epoch over the longer of its own rollout and training, ``overlap_ratio_alone``
    over the longer of them in the runs where nothing overlaps: what the two cost each other by sharing a machine is in
    the second alone. ``overlap_ratio_without`` is the first of an epoch without overlap, and ``overlap_speedup`` how
    many times as long that one takes.
    """
    found = [_ratios(pair) for pair in result["pairs"]]
    return {name: statistics.median(ratios[name] for ratios in found) for name in found[0]}


def table(result: Mapping[str, Any]) -> str:
    """Markdown: seconds by phase, and the ratios."""
    shape = result["shape"]
    names = ("epoch", "rollout", "waited", "train", "rescore", "sync", "doctor")
    lines = [f"| `rollouts_ahead` | {', s | '.join(names)}, s |", "|---|" + "---|" * len(names)]
    for ahead in ("0", "1"):
        epochs = [epoch for pair in result["pairs"] for epoch in pair[ahead]]
        lines.append(f"| {ahead} | " + " | ".join(shown(spread([e[name] for e in epochs])) for name in names) + " |")
    found = [_ratios(pair) for pair in result["pairs"]]
    rows = {
        "overlap_ratio": "overlapped epoch / longer of its rollout and training",
        "overlap_ratio_alone": "overlapped epoch / longer of both where nothing overlaps",
        "overlap_ratio_without": "epoch without overlap / longer of its rollout and training",
        "overlap_speedup": "epoch without overlap / overlapped epoch",
    }
    lines += [
        "",
        f"{shape['prompts']} prompts x {shape['samples']} samples of at most {shape['tokens']} tokens, one core for "
        "the trainer and one for the engine; medians, least and largest in brackets.",
        "",
        "| | ratio |",
        "|---|---|",
        *(f"| {text} | {shown(spread([ratios[name] for ratios in found]))} |" for name, text in rows.items()),
    ]
    return "\n".join(lines)


def main() -> None:
    """One run, its epochs to a file or to the terminal."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.performance.overlap", description=main.__doc__)
    parser.add_argument("--ahead", type=int, choices=(0, 1), required=True, help="rollouts_ahead")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--json", type=Path, help="file to write the counted epochs to")
    given = parser.parse_args()
    epochs = json.dumps(train(given.ahead, given.size), indent=2)
    if given.json is None:
        print(epochs)
    else:
        given.json.write_text(epochs + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
