"""``replay``: the loss and ratios of a stored epoch, computed again."""

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_lightning.errors import ConfigurationError
from grpo_lightning.runs import checkpoint_of_version, newest_checkpoint, newest_settings

if TYPE_CHECKING:
    from grpo_lightning.trajectories.replay import ReplayedUpdate
    from grpo_lightning.trajectories.stored import StoredEpoch

_COLUMNS = {
    "tokens": "tokens/trained",
    "ratio mean": "ppo/ratio_mean",
    "std": "ppo/ratio_std",
    "min": "ppo/ratio_min",
    "max": "ppo/ratio_max",
    "mismatch mean": "mismatch/logprob_abs_mean",
    "max ": "mismatch/logprob_abs_max",
    "k3": "mismatch/kl_k3",
}
"""Headings of the table, and the metrics under them."""


def main(command: str, args: list[str]) -> None:
    """Compute a stored epoch again with a checkpoint's weights, and print a line for each update."""
    parser = argparse.ArgumentParser(
        "grpo-lightning replay",
        description="Compute loss and ratios of a stored epoch again, from its tokens and a checkpoint. No engine and "
        "no environment is started, no step is taken, and the run is left as it is. TrajectoryStore stores epochs.",
    )
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--epoch", type=int, required=True, help="number of the epoch")
    parser.add_argument("--checkpoint", type=Path, help="the weights; the run's newest checkpoint by default")
    parser.add_argument("--json", type=Path, help="file to write the numbers to as well", metavar="FILE")
    given = parser.parse_args(args)
    settings, checkpoint = _files(given.run, given.checkpoint)

    from grpo_lightning.trajectories.store import load_epoch, stored_epochs

    epochs = stored_epochs(given.run)
    if given.epoch not in epochs:
        found = ", ".join(map(str, epochs)) or "none; the callback TrajectoryStore stores them"
        raise ConfigurationError(f"expected a stored epoch {given.epoch} in {given.run}, but there are: {found}")
    stored = load_epoch(epochs[given.epoch])
    version, updates = _replay(stored, settings, checkpoint)
    print(f"Checkpoint: {checkpoint} (policy version {version})")
    print(*_table(updates), _meaning(given.run, stored, version, updates), sep="\n")
    if given.json is not None:
        numbers = [{"loss": update.loss, **update.metrics} for update in updates]
        content = {"epoch": given.epoch, "checkpoint": str(checkpoint), "policy_version": version, "updates": numbers}
        given.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _files(run: Path, checkpoint: Path | None) -> tuple[Path, Path]:
    if not (run / "config.yaml").is_file():
        raise ConfigurationError(f"expected a run's folder, but there is no {run / 'config.yaml'}")
    checkpoint = checkpoint or newest_checkpoint(run)
    if checkpoint is None:
        raise ConfigurationError(
            f"expected a whole checkpoint in {run / 'checkpoints'}, but there is none; give one with --checkpoint FILE"
        )
    return newest_settings(run), checkpoint


def _replay(stored: "StoredEpoch", settings: Path, checkpoint: Path) -> "tuple[int, list[ReplayedUpdate]]":
    from tqdm import tqdm

    from grpo_lightning.cli.run_policy import run_policy
    from grpo_lightning.trajectories.replay import replay_update, update_batches

    with run_policy(settings, checkpoint) as module:
        updates = update_batches(stored, module.token_weights, module.objective.marks)
        count = sum(map(len, updates))
        with tqdm(desc="Replay", total=count, unit="micro-batch", leave=False, disable=None) as bar:
            return module.policy_version, [replay_update(module, batches, bar.update) for batches in updates]


def _table(updates: "Sequence[ReplayedUpdate]") -> list[str]:
    lines = [["update", "loss", *(heading.strip() for heading in _COLUMNS)]]
    for number, update in enumerate(updates):
        cells = [update.metrics.get(name) for name in _COLUMNS.values()]
        lines.append([str(number), f"{update.loss:.6g}", *("-" if c is None else f"{c:.6g}" for c in cells)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]


def _meaning(run: Path, stored: "StoredEpoch", version: int, updates: "Sequence[ReplayedUpdate]") -> str:
    from grpo_lightning.diagnostics.checks import MAX_MISMATCH
    from grpo_lightning.trajectories.replay import sampling_versions

    versions = sampling_versions(stored)
    if versions != [version]:
        right = checkpoint_of_version(run, versions[0]) if len(versions) == 1 else None
        return (
            f"The epoch was sampled by policy version {', '.join(map(str, versions))}, the checkpoint holds {version}: "
            "the ratios show how far apart they are, not what training saw. "
            + (
                "No checkpoint of the run holds what sampled it: ModelCheckpoint(save_top_k=-1, every_n_epochs=1) "
                "keeps one for each epoch but the first"
                if right is None
                else f"What sampled it: --checkpoint {shlex.quote(str(right))}"
            )
        )
    same = "The checkpoint holds the weights that sampled the epoch, so the ratios must be 1 up to rounding: "
    means = [update.metrics.get("mismatch/logprob_abs_mean", 0.0) for update in updates]
    found = f"the logprobs of engine and trainer differ by {max(means):.3g} nats on average"
    if max(means) <= MAX_MISMATCH:
        return f"{same}{found}"
    return f"{same}they are not, {found}. The engine sampled from something else"
