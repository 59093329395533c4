"""One run with faults in it: what was named, and when."""

import hashlib
import logging
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer, seed_everything

from benchmarks.faults.fault import Fault, Stage
from benchmarks.faults.witness import Witness, guard_finding
from grpo_lightning import GRPOModule, RolloutDataModule
from grpo_lightning.callbacks import EpochLine, RunDoctor
from grpo_lightning.errors import DegeneracyError
from grpo_lightning.rollout.engine import RolloutEngine
from grpo_lightning.tasks import SumTasks

_ROOT = Path(__file__).parents[2]
_MARGIN = 1
"""Rollouts after the deadline that a run goes on for, so that what comes late is seen as late."""


def longer_is_better(completion: str) -> float:
    """A reward that varies within every group."""
    return len(completion) / 10


class _Quiet(EpochLine):
    """Says nothing."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing."""


def quiet() -> None:
    """Leave what runs say of themselves out of what is printed."""
    from transformers.utils.logging import disable_progress_bar

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("grpo_lightning").setLevel(logging.ERROR)
    disable_progress_bar()  # type: ignore[no-untyped-call]


def make_stage(model: str, engine: RolloutEngine, folder: Path) -> Stage:
    """A healthy small run: 4 prompts of 4 samples, two updates a rollout."""
    return Stage(
        model,
        engine,
        folder,
        module={"dtype": "float32", "learning_rate": 2e-4},
        data={
            "rewards": longer_is_better,
            "prompts_per_rollout": 4,
            "samples_per_prompt": 4,
            "updates_per_rollout": 2,
            "max_tokens": 14,
            "max_prompt_tokens": 128,
        },
        trainer={
            "accelerator": "cpu",
            "default_root_dir": folder,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
        },
    )


def train(
    stage: Stage, doctor: RunDoctor, module: GRPOModule | None = None
) -> tuple[Trainer, BaseException | None, str]:
    """The run; returns its trainer, and what it raised with the last lines of the traceback.

    Args:
        stage: What to run.
        doctor: Who watches.
        module: What to train, instead of one that is made for this run.
    """
    seed_everything(0, verbose=False)
    with warnings.catch_warnings(), stage.patched():
        warnings.simplefilter("ignore")
        data = dict(stage.data)
        trainer = Trainer(**stage.trainer, callbacks=[*stage.callbacks, _Quiet(), doctor])
        try:
            trainer.fit(
                module or GRPOModule(stage.model, **stage.module),
                RolloutDataModule(SumTasks(), data.pop("rewards"), engine=stage.engine, **data),
            )
        except Exception as error:
            return trainer, error, traceback.format_exc(limit=-4)
    return trainer, None, ""


def run_faults(faults: Sequence[Fault], model: str, engine: RolloutEngine) -> dict[str, Any]:
    """Run with one fault or several, until a verdict halts it or the deadline of the first has passed.

    Args:
        faults: The one that must be named, then others.
        model: Folder of the model.
        engine: The engine that all of them need.

    Returns:
        What was named, when, and everything that was said.
    """
    first = faults[0]
    with tempfile.TemporaryDirectory(prefix="fault-") as folder:
        stage = make_stage(model, engine, Path(folder))
        for fault in faults:
            fault.inject(stage)
        per_rollout = stage.data["updates_per_rollout"] * stage.data.get("inner_epochs", 1)
        completions = stage.data["prompts_per_rollout"] * stage.data["samples_per_prompt"]
        deadline = first.deadline.updates(per_rollout, completions)
        stage.trainer["max_epochs"] = deadline // per_rollout + 1 + _MARGIN
        doctor = Witness()
        begin = time.monotonic()
        trainer, error, trace = train(stage, doctor)
    findings = list(doctor.findings)
    if error is not None and not isinstance(error, DegeneracyError):
        findings.append(guard_finding(error, trainer.global_step))
    # What is said first is what a user acts on, be it a warning.
    found = findings[0] if findings else None
    in_time = found is not None and first.deadline.met(found.moment, found.updates, deadline)
    return {
        "expected": first.expected[0],
        "accepted": list(first.expected),
        "got": "" if found is None else found.cause,
        "moment": "" if found is None else found.moment,
        "updates": trainer.global_step if found is None else found.updates,
        "deadline": first.deadline.text,
        "deadline_updates": deadline,
        "in_time": in_time,
        "expected_reaction": first.reaction,
        "reaction": "" if found is None else found.reaction,
        "injected": stage.injected,
        "refused_by_guard": found is not None and found.by_guard,
        "said": list(dict.fromkeys(f"{f.reaction} {f.cause}" for f in findings)),
        "named_correctly": found is not None
        and in_time
        and stage.injected
        and found.cause in first.expected
        and found.reaction == first.reaction
        and found.by_guard <= first.guard
        and {f.cause for f in findings if f.reaction == "halt"} <= set(first.expected),
        "explained": [] if found is None else list(found.explained),
        "seconds": round(time.monotonic() - begin, 1),
        "message": "" if found is None else found.text.splitlines()[0],
        "text": "" if found is None else found.text,
        "error": "" if error is None else f"{type(error).__name__}: {error}",
        "traceback": "" if isinstance(error, DegeneracyError) else trace,
        "silent": doctor.messages,
    }


def code_digest(*further: Path) -> str:
    """Names the code that a result belongs to: the package and this one.

    Args:
        *further: Other files that it depends on.
    """
    digest = hashlib.sha256()
    folders = [_ROOT / "grpo_lightning", _ROOT / "callbacks", _ROOT / "benchmarks" / "faults"]
    for path in sorted((*further, *(p for folder in folders for p in folder.rglob("*.py")))):
        digest.update(path.relative_to(_ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]
