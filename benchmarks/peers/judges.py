"""What the tools say of runs. Runs in their environment: of this project only `scalars` and `stored` are imported.

Run: python -m benchmarks.peers.judges RUN_FOLDER... (prints JSON)
"""

import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.peers.scalars import Row, scalars_of
from benchmarks.peers.stored import facts_of


@dataclass(frozen=True)
class Finding:
    """One thing that a tool said of a run.

    Attributes:
        name: The tool's own name for it.
        severity: The tool's own grade.
        update: Since when, as far as the tool says so.
        message: The tool's own words.
        alarm: Whether the tool means it as more than information.
    """

    name: str
    severity: str
    update: int | None
    message: str
    alarm: bool


@dataclass(frozen=True)
class Shown:
    """A run as it is shown: its rows, the rewards of each rollout, and its settings."""

    rows: Sequence[Row]
    rewards: Sequence[Sequence[float]]
    settings: Mapping[str, float]

    def new_rewards(self, step: int) -> Sequence[float]:
        """Rewards of the samples that an update is the first to train on; of others none, so that none counts twice."""
        rollout = int(self.rows[step]["epoch"])
        old = step > 0 and int(self.rows[step - 1]["epoch"]) == rollout
        return () if old or rollout >= len(self.rewards) else self.rewards[rollout]


def shown(folder: Path) -> Shown:
    """What there is of a run in its folder; rewards and settings may be missing."""
    facts = facts_of(folder)
    return Shown(scalars_of(folder), facts.get("rewards", ()), facts.get("settings", {}))


RLPROBE = {
    "reward_mean": "reward/mean",
    "reward_std": "reward/std",
    "reward_min": "reward/min",
    "reward_max": "reward/max",
    "kl_mean": "policy/kl_reference",
    "kl_max": "policy/kl_reference_max",
    "entropy_mean": "policy/entropy",
    "logprob_mean": "policy/logprob_mean",
    "ratio_mean": "ppo/ratio_mean",
    "ratio_p95": "ppo/ratio_p95",
    "clip_fraction": "ppo/clip_fraction",
    "adv_mean": "advantage/mean",
    "adv_std": "advantage/std",
    "adv_zero_frac": "advantage/zero_fraction",
    "group_reward_std_mean": "group/reward_std_mean",
    "zero_variance_group_frac": "group/zero_variance_fraction",
    "loss": "loss",
    "lr": "policy/learning_rate",
    "grad_norm": "policy/grad_norm",
    "weight_update_ratio": "policy/update_ratio",
    "completion_len_mean": "completion/length_mean",
    "completion_len_max": "completion/length_max",
    "truncation_rate": "completion/truncated_fraction",
    "repetition_rate": "completion/repetition",
}
"""Numbers of rlprobe's ``StepRecord`` by our names."""

KL_BY_POSITION = "policy/kl_reference_at_"
"""Columns with the KL to the reference at the first tokens, the next ones, and so on, in alphabetical order."""

RLDOCTOR = {
    "reward": "reward/mean",
    "reward_std": "reward/std",
    "reward_min": "reward/min",
    "reward_max": "reward/max",
    "eval_score": "val/reward",
    "frac_reward_zero_std": "group/zero_variance_fraction",
    "advantage/mean": "advantage/mean",
    "advantage/std": "advantage/std",
    "entropy": "policy/entropy",
    "kl": "policy/kl_reference",
    "clip_ratio/region_mean": "ppo/clip_fraction",
    "clip_ratio/low_mean": "ppo/clip_fraction_low",
    "clip_ratio/high_mean": "ppo/clip_fraction_high",
    "grad_norm": "policy/grad_norm",
    "learning_rate": "policy/learning_rate",
    "loss": "loss",
    "completions/mean_length": "completion/length_mean",
    "completions/max_length": "completion/length_max",
    "completions/clipped_ratio": "completion/truncated_fraction",
}
"""Keys that rl-doctor knows exactly, by our names."""

RLWATCH = {
    "entropy": "policy/entropy",
    "kl_divergence": "policy/kl_reference",
    "reward_mean": "reward/mean",
    "reward_std": "reward/std",
    "advantage_std": "advantage/std",
    "loss": "loss",
    "learning_rate": "policy/learning_rate",
    "clip_fraction": "ppo/clip_fraction",
    "grad_norm": "policy/grad_norm",
}
"""Arguments of rlwatch's ``log_step`` by our names."""

SHOWN = {*RLPROBE.values(), *RLDOCTOR.values(), *RLWATCH.values()}
"""Our names of all that some tool has a name for; the columns of `KL_BY_POSITION` come on top."""


def translated(row: Row, names: Mapping[str, str]) -> Row:
    """A row under a tool's own names, as far as it has them."""
    return {theirs: row[ours] for theirs, ours in names.items() if ours in row}


def rlprobe(run: Shown, scratch: Path) -> list[Finding]:
    """Record with rlprobe's manual API and ask its doctor."""
    from rlprobe.doctor import diagnose
    from rlprobe.recorder import Recorder

    recorder = Recorder(scratch, algorithm="grpo", capture_env=False, install_handlers=False)
    for step, row in enumerate(run.rows):
        recorder.log_step(
            step,
            **translated(row, RLPROBE),
            # Its own adapter counts what cannot be written as a number.
            nan_count=sum(map(math.isnan, (row["policy/grad_norm"], row.get("loss", 0.0)))),
            kl_positional=[row[name] for name in sorted(row) if name.startswith(KL_BY_POSITION)],
        )
        recorder.log_samples(step, [{"reward_total": reward} for reward in run.new_rewards(step)], select=False)
    recorder.close()
    return [
        Finding(f.signature_id, f.severity, f.first_step, f.explanation, f.severity != "info")
        for f in diagnose(scratch)
    ]


def rldoctor(run: Shown, scratch: Path) -> list[Finding]:
    """Give rl-doctor the records and the configuration, and ask for its diagnosis."""
    from rl_doctor import Severity, diagnose, run_from_records

    records = [{"step": step, **translated(row, RLDOCTOR)} for step, row in enumerate(run.rows)]
    config = {"algorithm": "grpo", **run.settings}
    return [
        Finding(f.detector, f.severity.label, None, f.summary, f.severity >= Severity.WARNING)
        for f in diagnose(run_from_records(records, config=config)).problems
    ]


def rlwatch(run: Shown, scratch: Path) -> list[Finding]:
    """Log each update with rlwatch's manual API, rewards of single samples included, and note its alerts."""
    import numpy
    from rlwatch import attach

    monitor = attach(framework="manual", run_id=scratch.name, storage={"log_dir": str(scratch)})
    found: dict[str, Finding] = {}
    for step, row in enumerate(run.rows):
        rewards = run.new_rewards(step)
        new = {"rewards": numpy.array(rewards)} if rewards else {}
        for alert in monitor.log_step(step, **new, **translated(row, RLWATCH)):
            found.setdefault(
                f"{alert.detector} {alert.severity}",
                Finding(alert.detector, alert.severity, alert.step, alert.message, True),
            )
    monitor.stop()
    return list(found.values())


JUDGES: dict[str, Callable[[Shown, Path], list[Finding]]] = {
    "rlprobe": rlprobe,
    "rldoctor": rldoctor,
    "rlwatch": rlwatch,
}


def judged(folders: Sequence[Path]) -> dict[str, Any]:
    """What each tool says of each run, and the tools' versions."""
    runs = {folder.name: shown(folder) for folder in folders}
    # The tools keep files where they are started.
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        said = {
            name: {
                tool: [asdict(finding) for finding in judge(run, Path(scratch, tool, name))]
                for tool, judge in JUDGES.items()
            }
            for name, run in runs.items()
        }
        os.chdir("/")
    return {"versions": {tool: version(tool) for tool in JUDGES}, "said": said}


if __name__ == "__main__":
    with redirect_stdout(sys.stderr):
        result = judged([Path(folder).resolve() for folder in sys.argv[1:]])
    print(json.dumps(result))
