"""Noting what the doctor says."""

import re
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from grpo_lightning.callbacks import RunDoctor
from grpo_lightning.diagnostics import Status, Verdict
from grpo_lightning.diagnostics.causes import Reaction
from grpo_lightning.diagnostics.conclusion import diagnose
from grpo_lightning.diagnostics.examination import Run
from grpo_lightning.errors import LedgerError, LogprobValidationError, StaleRolloutError


@dataclass(frozen=True)
class Finding:
    """One diagnosis.

    Attributes:
        cause: The root cause.
        reaction: What was done.
        moment: ``"sync"``, ``"rollout"``, ``"update"`` (before the step) or ``"step"`` (after it); ``"guard"`` where
            an error did not come from the doctor, nor from publishing.
        updates: Optimizer steps applied by then.
        explained: Causes of the later symptoms.
        text: The message.
        by_guard: A guard of the code itself raised, and `named_by_guard` read the cause from its message.
    """

    cause: str
    reaction: Reaction
    moment: str
    updates: int
    explained: tuple[str, ...]
    text: str
    by_guard: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class Witness(RunDoctor):
    """`RunDoctor` that notes every diagnosis and counts every verdict.

    Args:
        acts: Also do what the doctor does about it; otherwise the run goes on.
        **settings: Arguments of `RunDoctor`.

    Attributes:
        findings: Diagnoses so far.
        counts: Verdicts so far, by check and status.
        messages: The latest message of each check that had no power.
    """

    def __init__(self, *, acts: bool = True, **settings: Any) -> None:
        super().__init__(report=False, **settings)
        self._acts = acts
        self.findings: list[Finding] = []
        self.counts: dict[str, dict[str, int]] = {}
        self.messages: dict[str, str] = {}
        self._moment = ("sync", 0)

    def examine_engine(self, trainer: Trainer) -> None:
        """Note the moment."""
        self._moment = ("sync", trainer.global_step)
        super().examine_engine(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note the moment."""
        self._moment = ("rollout", trainer.global_step)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Note the moment."""
        self._moment = ("update", trainer.global_step)
        super().on_before_optimizer_step(trainer, pl_module, optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the moment."""
        self._moment = ("step", trainer.global_step)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _conclude(self, run: Run, verdicts: Sequence[Verdict]) -> None:
        for verdict in verdicts:
            count = self.counts.setdefault(verdict.check, {status.value: 0 for status in Status})
            count[verdict.status.value] += 1
            if verdict.status is Status.NO_POWER:
                self.messages[verdict.check] = verdict.message
        diagnosis = diagnose(verdicts, self._reactions)
        if diagnosis is not None:
            explained = tuple(v.cause for v in diagnosis.explained)
            self.findings.append(
                Finding(diagnosis.root.cause, diagnosis.reaction, *self._moment, explained, str(diagnosis))
            )
        if self._acts:
            super()._conclude(run, verdicts)


_GUARDS: tuple[tuple[type[Exception], str, str], ...] = (
    (LogprobValidationError, r"returned no sample-time logprobs|expected finite logprobs", "logprobs_missing"),
    (LogprobValidationError, r"are exactly -?0\.0:", "logprobs_zero"),
    (LogprobValidationError, r"sample-time logprobs are exactly", "logprobs_constant"),
    (LedgerError, r"tokens in the loss were not sampled.*environment", "environment_in_mask"),
    (LedgerError, r"tokens in the loss were not sampled.*forced", "forced_in_mask"),
    (LedgerError, r"expected the ledger's sampled tokens to be those", "retokenised"),
    (StaleRolloutError, r"publish did not load the adapter", "sync_noop"),
    (ValueError, r"expected old logprobs without gradient", "old_attached"),
    (FloatingPointError, r"the loss is not finite", "not_finite"),
)
"""Errors of the code's own guards whose message says what is wrong, with the cause that they name."""


def guard_finding(error: BaseException, step: int) -> Finding:
    """What an error that is not the doctor's says.

    Args:
        error: The error.
        step: Optimizer steps applied by then.
    """
    frames = (frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__))
    moment = "sync" if "ensure_synced" in frames else "guard"
    return Finding(named_by_guard(error), "halt", moment, step, (), str(error), by_guard=True)


def named_by_guard(error: BaseException) -> str:
    """The cause that a guard's message names; empty if it names none."""
    for kind, pattern, cause in _GUARDS:
        if isinstance(error, kind) and re.search(pattern, str(error), re.DOTALL):
            return cause
    return ""
