"""How old a rollout is when it is trained on."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from grpo_lightning.diagnostics.verdict import Status, Verdict

_NAME = "rollout age"


def check_age(versions: NDArray[np.int64], *, current: int, steps: int | None, lag: int) -> Verdict:
    """A new rollout was sampled by the policy that is about to be trained, or one as old as declared.

    Args:
        versions: Policy version of each sampled token, ``[N]``.
        current: The trainer's version.
        steps: Optimizer steps since the oldest of these versions was published; None if that is not known. Versions
            count every change of the weights, steps those that make a rollout older.
        lag: How many versions a rollout may be behind: ``max_lag``, and one epoch's updates with ``rollouts_ahead=1``.
    """
    if not len(versions):
        return Verdict(_NAME, Status.NO_POWER, "The rollout has no sampled tokens.")
    oldest, newest = int(versions.min()), int(versions.max())
    evidence: dict[str, float | int | str] = {
        "sampled by version": oldest if oldest == newest else f"{oldest} to {newest}",
        "trainer's version": current,
        "allowed lag": lag,
    }
    behind = current - oldest if steps is None else steps
    if steps is not None:
        evidence["optimizer steps since"] = steps
    if oldest < 0 or newest > current:
        message = f"Tokens name a policy version that the trainer never had ({oldest} to {newest})."
    elif behind > lag:
        message = f"Before its first update the rollout is {behind} updates old; {lag} are declared."
    else:
        return Verdict(_NAME, Status.PASS, evidence=evidence)
    return Verdict(
        _NAME,
        Status.FAIL,
        message,
        "Sync the engine before each rollout and make a new rollout each epoch. If samples lag on purpose, declare it "
        "with LoRAWeightSync(max_lag=...) or RolloutDataModule(rollouts_ahead=1).",
        evidence,
        cause="stale_rollout",
        ruled_out=("a declared lag (it is allowed for)",),
    )


def check_reuse(updates: int, planned: int) -> Verdict:
    """A rollout is trained on as often as planned.

    Args:
        updates: Updates with it, this one included.
        planned: ``updates_per_rollout * inner_epochs``.
    """
    evidence: dict[str, float | int | str] = {"updates with this rollout": updates, "planned": planned}
    if updates <= planned:
        return Verdict("rollout reuse", Status.PASS, evidence=evidence)
    return Verdict(
        "rollout reuse",
        Status.FAIL,
        f"This is update {updates} with one rollout; {planned} are planned.",
        "Have each epoch make its own rollout: look at what keeps loaders or batches.",
        evidence,
        cause="stale_rollout",
        ruled_out=("several inner epochs (they are planned)",),
    )


def last_equal(history: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The entries at the end that equal the last one."""
    equal = []
    for entry in reversed(history):
        if entry != history[-1]:
            break
        equal.append(entry)
    return equal
