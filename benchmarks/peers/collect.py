"""Making the runs: what each logs, and what this project's own doctor says in the same run."""

import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from benchmarks.faults.fault import Stage
from benchmarks.faults.runner import code_digest, train
from benchmarks.faults.witness import Finding, Witness
from benchmarks.peers.cases import CASES, DATA, Case
from benchmarks.peers.judges import KL_BY_POSITION, SHOWN
from benchmarks.peers.scalars import scalars_of, write_scalars
from benchmarks.peers.stored import FACTS, facts_of
from grpo_lightning import GRPOModule, TransformersEngine
from grpo_lightning.diagnostics import MicroBatchEvidence
from grpo_lightning.diagnostics.foreign.log import NAMES
from grpo_lightning.rollout.episode import Group

UPDATES, SMALL = 120, 12
"""The longest wait among the checks that apply is rlwatch's, for 100; a small run only shows that it can be made."""
POSITIONS = 5
"""Parts of the completion that the KL to the reference is averaged in."""
KEPT = {"step", "epoch", *SHOWN, *NAMES}
"""Columns that some tool reads, or this project's own reader of logs."""


class Scalars(Callback):
    """Logs what the tools know a name for and a run does not log by itself, at each update.

    Attributes:
        rewards: Of all samples of each rollout.
    """

    def __init__(self) -> None:
        self.rewards: list[list[float]] = []
        self._before: list[Tensor] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note the rewards of a new rollout, and the weights."""
        assert isinstance(pl_module, GRPOModule)
        if batch.first_of_rollout:
            self.rewards.append([round(e.reward, 4) for g in _groups(trainer) for e in g.episodes])
        self._before = [p.detach().clone() for p in pl_module.policy.trainable_parameters().values()]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log."""
        assert isinstance(pl_module, GRPOModule)
        after = list(pl_module.policy.trainable_parameters().values())
        moved = sum(float((a.detach() - b).square().sum()) for a, b in zip(after, self._before, strict=True))
        size = sum(float(b.square().sum()) for b in self._before)
        scalars = {
            "loss": float(outputs["loss"]),
            "policy/learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            "policy/update_ratio": (moved / size) ** 0.5,
            **of_tokens(pl_module.current_update().evidence),
            **of_rollout(_groups(trainer)),
        }
        pl_module.log_dict(scalars, on_step=True, on_epoch=False)


def of_tokens(evidence: MicroBatchEvidence) -> dict[str, float]:
    """Scalars of an update's tokens."""
    kl = evidence.reference_kl
    part = ((evidence.ledger_index - evidence.sequence) * POSITIONS // DATA["max_tokens"]).clamp(max=POSITIONS - 1)
    low, high = evidence.clipped_low.double().mean(), evidence.clipped_high.double().mean()
    scalars = {
        "advantage/mean": evidence.advantage.mean(),
        "advantage/std": evidence.advantage.std(correction=0),
        "advantage/zero_fraction": (evidence.advantage == 0).double().mean(),
        "policy/entropy": evidence.entropy.mean(),
        "policy/logprob_mean": evidence.logprobs.mean(),
        "policy/kl_reference": kl.mean(),
        "policy/kl_reference_max": kl.max(),
        "ppo/ratio_p95": evidence.log_ratio.exp().quantile(0.95),
        "ppo/clip_fraction": low + high,
        "ppo/clip_fraction_low": low,
        "ppo/clip_fraction_high": high,
        **{f"{KL_BY_POSITION}{n}": kl[part == n].mean() for n in range(POSITIONS) if (part == n).any()},
    }
    return {name: float(value) for name, value in scalars.items()}


def of_rollout(groups: Sequence[Group]) -> dict[str, float]:
    """Scalars of a rollout's samples."""
    rewards = [[e.reward or 0.0 for e in group.episodes] for group in groups]
    flat = [reward for group in rewards for reward in group]
    return {
        "reward/min": min(flat),
        "reward/max": max(flat),
        "group/reward_std_mean": statistics.mean(map(statistics.pstdev, rewards)),
        "completion/repetition": statistics.mean(repetition(e.text) for group in groups for e in group.episodes),
    }


def repetition(text: str) -> float:
    """Share of a text's triples of characters that stood in it before."""
    triples = Counter(text[i : i + 3] for i in range(len(text) - 2))
    return 1 - len(triples) / triples.total() if triples else 0.0


def run(case: Case, model: str, folder: Path, updates: int = UPDATES, code: str = "") -> list[Finding]:
    """Make one run to its end, whatever the doctor says, and write what it logged.

    Args:
        case: Which.
        model: Folder of the model.
        folder: Where to: ``metrics.csv``, and ``run.json`` with rewards, settings and the doctor's notes.
        updates: Optimizer steps, in whole rollouts.
        code: Names the code that makes the run.

    Returns:
        What the doctor says: the first diagnosis of each cause.

    Raises:
        RuntimeError: If something else than the doctor ended the run, or the fault found nothing to change.
    """
    scalars, doctor = Scalars(), Witness(acts=False)
    with TemporaryDirectory() as temporary:
        stage = case.stage(model, TransformersEngine(dtype="float32"), Path(temporary))
        per_rollout = stage.data["updates_per_rollout"] * stage.data.get("inner_epochs", 1)
        logger = CSVLogger(temporary, name="log", version="")
        stage.callbacks.append(scalars)
        stage.trainer |= {
            "logger": logger,
            "log_every_n_steps": 1,
            "max_epochs": -(-updates // per_rollout),
            "check_val_every_n_epoch": max(1, 10 // per_rollout),
        }
        _, error, trace = train(stage, doctor)
        if error is not None:
            raise RuntimeError(f"expected {case.name} to go on for {updates} updates, but\n{trace}") from error
        if not stage.injected:
            raise RuntimeError(f"expected a fault in {case.name}, but nothing was there to change")
        logger.finalize("success")
        rows = scalars_of(Path(logger.log_dir))
    names = {name for row in rows for name in row}
    write_scalars(folder, rows, sorted(n for n in names if n in KEPT or n.startswith(KL_BY_POSITION)))
    first = {finding.cause: finding for finding in reversed(doctor.findings)}
    noted = sorted(first.values(), key=doctor.findings.index)
    facts = {
        "code": code,
        "updates": updates,
        "settings": _settings(stage),
        "doctor": [_note(f) for f in noted],
        "rewards": scalars.rewards,
    }
    (folder / FACTS).write_text(json.dumps(facts) + "\n", encoding="utf-8")
    return noted


def _settings(stage: Stage) -> dict[str, float]:
    """What rl-doctor wants to know of the configuration."""
    return {
        "learning_rate": stage.module["learning_rate"],
        "beta": stage.module["kl_coef"],
        "epsilon": 0.2,
        "num_generations": stage.data["samples_per_prompt"],
        "max_completion_length": stage.data["max_tokens"],
    }


def _note(finding: Finding) -> dict[str, Any]:
    return {
        "cause": finding.cause,
        "reaction": finding.reaction,
        "updates": finding.updates,
        "message": finding.text.splitlines()[0],
    }


def _is_there(folder: Path, code: str, updates: int) -> bool:
    facts = facts_of(folder)
    return (facts.get("code"), facts.get("updates")) == (code, updates)


def collect_runs(
    target: Path, names: Iterable[str] = (), *, updates: int = UPDATES, fresh: bool = False
) -> tuple[str, ...]:
    """Make the runs that this code has not made yet, each in a folder of its name, and print a line for each.

    Args:
        target: Folder of the folders.
        names: Which runs; all by default.
        updates: Optimizer steps of each.
        fresh: Make also those that are there.

    Returns:
        The runs that are still to be made.
    """
    known = [case.name for case in CASES]
    wanted = [*names] or known
    if unknown := set(wanted) - set(known):
        raise SystemExit(f"unknown runs: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    here = Path(__file__).parent
    code = code_digest(*(here / name for name in ("cases.py", "collect.py", "judges.py", "scalars.py")))
    with TemporaryDirectory() as folder:
        model = _tiny_model(Path(folder))
        for case in CASES:
            if case.name not in wanted:
                continue
            if not fresh and _is_there(target / case.name, code, updates):
                print(f"{case.name:<36} is there", flush=True)
                continue
            begin = time.monotonic()
            noted = run(case, model, target / case.name, updates, code)
            said = ", ".join(f"{f.cause} after {f.updates} ({f.reaction})" for f in noted) or "nothing"
            print(f"{case.name:<36} {time.monotonic() - begin:3.0f} s, the doctor: {said}", flush=True)
    return tuple(name for name in known if not _is_there(target / name, code, updates))


def _groups(trainer: Trainer) -> Sequence[Group]:
    return trainer.datamodule.rollout.groups  # type: ignore[attr-defined, no-any-return]


def _tiny_model(folder: Path) -> str:
    """The tests' model: two layers, a vocabulary of characters."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
    from conftest import TINY, save_model
    from transformers import LlamaConfig, LlamaForCausalLM

    return save_model(folder / "tiny", LlamaForCausalLM, LlamaConfig(**TINY))
