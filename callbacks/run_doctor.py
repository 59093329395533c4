"""Examining a run while it trains, and halting it before an update that cannot mean anything."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer

from grpo_lightning.callbacks.lora_sync import LoRAWeightSync
from grpo_lightning.callbacks.run_directory import run_directory
from grpo_lightning.datamodule import RolloutDataModule
from grpo_lightning.diagnostics import Status, Verdict
from grpo_lightning.diagnostics.causes import BY_NAME, Reaction
from grpo_lightning.diagnostics.checks import MAX_MISMATCH
from grpo_lightning.diagnostics.checks.step import StepSize
from grpo_lightning.diagnostics.conclusion import REACTIONS, Diagnosis, diagnose
from grpo_lightning.diagnostics.examination import Examination, Run
from grpo_lightning.diagnostics.examinations.engine import CANARY_TOKENS, EngineExamination
from grpo_lightning.diagnostics.examinations.gradient import GradientExamination
from grpo_lightning.diagnostics.examinations.ratio import MIN_STD, RatioExamination
from grpo_lightning.diagnostics.examinations.rollout import RolloutExamination
from grpo_lightning.diagnostics.examinations.sampling import SamplingExamination
from grpo_lightning.diagnostics.examinations.step import StepExamination
from grpo_lightning.diagnostics.record import Record
from grpo_lightning.diagnostics.report.files import PAGE, write_report
from grpo_lightning.diagnostics.rescoring import EPISODES
from grpo_lightning.diagnostics.thresholds import Thresholds
from grpo_lightning.diagnostics.truncation import EXAMINED_TOKENS, Kept, kept_tokens
from grpo_lightning.diagnostics.update import Update
from grpo_lightning.distributed import processes
from grpo_lightning.errors import ConfigurationError, DegeneracyError, RatioDegeneracyError, RolloutError
from grpo_lightning.module import GRPOModule
from grpo_lightning.rollout.batch import PackedBatch
from grpo_lightning.versions import package_versions

logger = logging.getLogger(__name__)

_RATIO_CHECKS = ("old logprobs", "ratio")


class RunDoctor(Callback):
    """Finds silent failures, names their cause, and halts training before the update that would suffer from it.

    Args:
        min_std: Spread of the ratio below which it is degenerate.
        strict: Halt on ``std < min_std`` whatever the number of updates since sampling. This also halts a healthy
            first update on a float32 engine: use it only with several updates per rollout or a noisy engine.
        warn_std: Optionally warn when the ratio's std is below this level after at least one update since sampling.
            No fixed level is right for all runs (0.006 is a healthy value), hence off by default.
        max_mismatch: Largest RMS difference in nats between the trainer's and the engine's logprobs right after
            sampling, when both hold the same weights.
        bitwise_consistent_engine: Declare that the engine's logprobs equal the trainer's bit for bit by design.
        reactions: What to do about a failure, by the name of a cause or a check: ``"halt"`` raises, ``"warn"`` warns
            and goes on, ``"log"`` only writes it down. ``{"all": "warn"}`` stands for all that are not named.
        thresholds: Limits of the checks.
        canary_tokens: About how many tokens trainer and engine are compared on before the first rollout and at every
            publication; where both compute in float32 the first 32 do for most of that. 0 leaves it out.
        ascent_every: Updates from one comparison of what the policy did with what its gradient says to the next. Each
            costs a forward pass over one update.
        rescored: Completions of each rollout on which plain reward functions are called a second time, to compare;
            0 leaves that out.
        report: Write ``doctor.json`` and ``doctor.html`` to the run's folder when training ends, however it ends;
            not with ``fast_dev_run``.
    """

    def __init__(
        self,
        *,
        min_std: float = MIN_STD,
        strict: bool = False,
        warn_std: float | None = None,
        max_mismatch: float = MAX_MISMATCH,
        bitwise_consistent_engine: bool = False,
        reactions: dict[str, Reaction] | None = None,
        thresholds: Thresholds | None = None,
        canary_tokens: int = CANARY_TOKENS,
        ascent_every: int = 100,
        rescored: int = EPISODES,
        report: bool = True,
    ) -> None:
        # All arguments, whichever there are: the report shows them.
        self._settings = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        if canary_tokens < 0 or ascent_every < 1:
            raise ConfigurationError(
                f"expected canary_tokens >= 0 and ascent_every >= 1, but got {canary_tokens} and {ascent_every}"
            )
        if rescored < 0:
            raise ConfigurationError(f"expected rescored >= 0, but got {rescored}")
        self._ascent_every = ascent_every
        self._engine = EngineExamination(canary_tokens, max_mismatch) if canary_tokens else None
        self._reactions = _checked(reactions or {})
        self._thresholds = thresholds or Thresholds()
        self._parts: tuple[Examination, ...] = (
            RatioExamination(
                min_std=min_std,
                strict=strict,
                warn_std=warn_std,
                max_mismatch=max_mismatch,
                bitwise_consistent_engine=bitwise_consistent_engine,
                compare_base=lambda: self._engine is None or self._engine.noise_floor is None,
            ),
            *self._further_parts(),
        )
        self._announced = False
        self._said: list[str] = []
        self._step: tuple[Update, StepSize] | None = None
        self._kept: Kept | None = None
        self._latest: dict[str, Verdict] = {}
        self._report = report
        self._record = Record()
        self.page: Path | None = None

    def _further_parts(self) -> tuple[Examination, ...]:
        """What sees more of the run than its updates."""
        engine = () if self._engine is None else (self._engine,)
        return (
            *engine,
            RolloutExamination(self._settings["rescored"]),
            SamplingExamination(max_mismatch=self._settings["max_mismatch"]),
            GradientExamination(),
            StepExamination(self._ascent_every),
        )

    @property
    def verdicts(self) -> list[Verdict]:
        """The last verdict of each check."""
        return list(self._latest.values())

    @property
    def state_key(self) -> str:
        """Key of the state in checkpoints, independent of the class's name."""
        return "grpo_lightning.run_doctor"

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run is judged against."""
        return {"record": self._record.state_dict(), **{part.name: part.state_dict() for part in self._parts}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        if "record" in state_dict:
            self._record.load_state_dict(state_dict["record"])
        for part in self._parts:
            if part.name in state_dict:
                part.load_state_dict(state_dict[part.name])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier run; a checkpoint's state is restored after this."""
        self._announced, self._said, self._step, self._latest = False, [], None, {}
        self._kept = None
        self._record = Record()
        reports = self._report and stage == "fit" and not trainer.fast_dev_run  # type: ignore[attr-defined]
        self.page = run_directory(trainer) / PAGE if reports else None
        for part in self._parts:
            part.reset()

    def examine_engine(self, trainer: Trainer) -> None:
        """The data module calls this after each publication, before anything is generated; first process."""
        run = self._run(trainer)
        self._conclude(run, _ask(self._parts, lambda part: part.on_sync(run)))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Examine a rollout before its first micro-batch is computed."""
        if not isinstance(batch, PackedBatch):
            return
        run = self._run(trainer)
        with run.module.phases("doctor"):
            if batch.first_of_rollout and run.data is not None and run.data.rollout is not None:
                rollout = run.data.rollout
                self._conclude(
                    run, processes().from_first(lambda: _ask(self._parts, lambda part: part.on_rollout(run, rollout)))
                )
                if run.data.truncated and processes().first:
                    leading = batch.first_rows(EXAMINED_TOKENS)
                    kept = kept_tokens(run, leading, run.data.top_p, run.data.top_k)
                    self._kept = kept.of((leading.loss_weight > 0).cpu())
            for part in self._parts:
                part.on_batch(run, batch)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Judge the step. Nothing has been applied yet when this raises."""
        run = self._run(trainer)
        update = run.module.current_update()
        if not self._announced:
            rank_zero_info("using stored sample-time logprobs as old, current policy as new")
            self._announced = True
        stats = update.ratio
        logger.info(
            "PPO Ratio Check - mean: %.6f, std: %.6g, count: %d", stats["mean"], stats["std"], int(stats["count"])
        )
        self._record.add_update(trainer.global_step, update.numbers())
        with run.module.phases("doctor"):
            # The first process has the ledger; all halt together.
            self._conclude(
                run,
                processes().from_first(
                    lambda: _ask(self._parts, lambda part: part.on_update(run, _with_ledger(update, run)))
                ),
            )
            # The step that follows makes it the past's.
            self._kept = None
            for part in self._parts:
                part.before_step(run, update, optimizer)
            self._step = (update, StepSize(run.trainable, optimizer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After a step: did it do what it should?"""
        if self._step is None:
            return
        (update, step), self._step = self._step, None
        run = self._run(trainer)
        with run.module.phases("doctor"):
            step.take(run.trainable)
            self._conclude(run, _ask(self._parts, lambda part: part.after_step(run, update, step)))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the epoch's numbers for the report."""
        metrics = self._run(trainer).module.epoch_metrics()
        self._record.add_epoch(trainer.current_epoch + 1, trainer.global_step, metrics)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the report."""
        self._write_report(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write what there is of the report of a fit."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._write_report(trainer, type(exception).__name__)

    def _write_report(self, trainer: Trainer, ended_by: str = "") -> None:
        """Neither the end of a run nor its exception may be lost to what goes wrong here."""
        if self.page is None or not trainer.is_global_zero:
            return
        try:
            content = self._record.content(
                source="run",
                run={"model": self._run(trainer).module.model_name, "ended_by": ended_by},
                versions=package_versions(),
                settings={**self._settings, "thresholds": self._thresholds},
                parts={part.name: part.facts() for part in self._parts},
            )
            write_report(self.page.parent, content)
        except Exception as error:
            rank_zero_warn(f"the doctor's report could not be written: {error}")

    def _run(self, trainer: Trainer) -> Run:
        module, data = trainer.lightning_module, getattr(trainer, "datamodule", None)
        if not isinstance(module, GRPOModule):
            raise TypeError(f"expected a GRPOModule, but got {type(module).__name__}")
        callbacks: Iterable[Callback] = getattr(trainer, "callbacks", ())
        return Run(
            trainer=trainer,
            module=module,
            data=data if isinstance(data, RolloutDataModule) else None,
            sync=next((c for c in callbacks if isinstance(c, LoRAWeightSync)), None),
            thresholds=self._thresholds,
            noise_floor=max((p.noise_floor for p in self._parts if p.noise_floor is not None), default=None),
            kept=self._kept,
        )

    def _conclude(self, run: Run, verdicts: Sequence[Verdict]) -> None:
        """Act on the first cause among a moment's verdicts."""
        if not verdicts:
            return
        # Of several answers to one question, the first failure counts.
        failed = [verdict for verdict in verdicts if verdict.status is Status.FAIL]
        self._latest |= {v.check: v for v in (*verdicts, *failed[::-1])}
        diagnosis = diagnose(verdicts, self._reactions)
        message = "" if diagnosis is None else self._text(diagnosis)
        self._record.add_verdicts(run.trainer.global_step, verdicts, diagnosis, message)
        if diagnosis is None:
            return
        if diagnosis.reaction == "halt":
            raise (RatioDegeneracyError if diagnosis.root.check in _RATIO_CHECKS else DegeneracyError)(message)
        # What goes on is said once, and hides nothing that comes later.
        news = diagnose([v for v in verdicts if v.cause not in self._said], self._reactions)
        if news is None:
            return
        message = self._text(news)
        self._said += [v.cause for v in (news.root, *news.explained)]
        if news.reaction == "warn":
            rank_zero_warn(message)
        else:
            logger.info("%s", message)

    def _text(self, diagnosis: Diagnosis) -> str:
        present = {v.cause for v in (diagnosis.root, *diagnosis.explained)}
        earlier = [BY_NAME[cause].title for cause in dict.fromkeys(self._said) if cause not in present]
        known = f"\nFound earlier in this run, and perhaps the reason: {'; '.join(earlier)}." if earlier else ""
        return _message(diagnosis) + known


def _ask(parts: Iterable[Examination], question: Callable[[Examination], Sequence[Verdict]]) -> list[Verdict]:
    """All parts' verdicts; those of the parts before one that the engine failed, if they say why it did."""
    verdicts: list[Verdict] = []
    for part in parts:
        try:
            verdicts += question(part)
        except RolloutError:
            if not any(verdict.status is Status.FAIL for verdict in verdicts):
                raise
            break
    return verdicts


def _checked(reactions: dict[str, Reaction]) -> dict[str, Reaction]:
    known = {"all", *BY_NAME, *(cause.check for cause in BY_NAME.values())}
    if unknown := sorted(set(reactions) - known):
        raise ConfigurationError(
            f"expected reactions by cause or check, but got {', '.join(map(repr, unknown))}; "
            f"known: {', '.join(sorted(known))}"
        )
    if wrong := sorted(set(map(str, reactions.values())) - set(REACTIONS)):
        raise ConfigurationError(f"expected the reactions {', '.join(REACTIONS)}, but got {', '.join(wrong)}")
    return reactions


def _with_ledger(update: Update, run: Run) -> Update:
    """Put what the rollout keeps of these tokens beside what the loss used."""
    data = run.data
    if data is None or data.rollout is None:
        return update
    rows, rescored = update.evidence.ledger_index, data.rollout.rescored
    evidence = replace(update.evidence, stored=data.rollout.stored_logprobs(rows))
    if data.truncated:
        above = evidence.logprobs - evidence.stored
        unknown = torch.full_like(above, torch.nan)
        evidence = replace(evidence, log_mass=unknown if run.kept is None else run.kept.mass_of(rows, above))
    if run.module.objective.proximal and rescored is not None:
        evidence = replace(evidence, proximal=rescored.proximal(rows))
    return replace(update, evidence=evidence)


def _message(diagnosis: Diagnosis) -> str:
    root, text = diagnosis.root, str(diagnosis)
    if root.check in _RATIO_CHECKS and "degenerate" not in root.message:
        std = root.evidence.get("log-ratio used, std")
        shown = f" (std={std:.3g})" if isinstance(std, float) else ""
        return f"PPO ratios are degenerate{shown}. Training cannot proceed.\n{text}"
    return text
