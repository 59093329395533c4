"""The optimizer's steps are taken, and the policy follows them."""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from grpo_lightning.diagnostics.checks.ascent import check_descends
from grpo_lightning.diagnostics.checks.optimizer import (
    check_collapse,
    check_learning_rate,
    check_processes,
    check_steps,
    check_trained,
)
from grpo_lightning.diagnostics.checks.step import StepSize, check_kept, check_step_size, share_kept
from grpo_lightning.diagnostics.examination import Examination, Run
from grpo_lightning.diagnostics.examinations.ascent import Ascent
from grpo_lightning.diagnostics.examinations.gradient import KEPT_FACTS, first_of_update
from grpo_lightning.diagnostics.thresholds import Thresholds
from grpo_lightning.diagnostics.update import Update
from grpo_lightning.diagnostics.verdict import Status, Verdict
from grpo_lightning.distributed import processes
from grpo_lightning.functional import kl_k3
from grpo_lightning.rollout.batch import PackedBatch
from grpo_lightning.rollout.rollout import Rollout

_SMALL_STEPS = 2
"""Steps in a row that must be too small. One alone may follow a gradient that fell by orders of magnitude."""


class StepExamination(Examination):
    """Keeps the optimizer's books, and asks now and then whether the policy moves the way its gradient says.

    Args:
        every: Updates from one comparison of policy and gradient, and of the processes, to the next.
    """

    name = "step"

    def __init__(self, every: int = 100) -> None:
        self._every = every
        self.reset()

    def reset(self) -> None:
        """Forget an earlier run."""
        self._ascent = Ascent(self._every)
        self._trained: set[str] = set()
        self._begun = self._taken = 0
        self._without_lr = self._small = self._up = self._far = 0
        self._largest_gradient = self._first_entropy = 0.0
        self._collapsed = self._called_small = False
        self._last: tuple[dict[str, Tensor], dict[str, Tensor], float] | None = None
        self._kept: Verdict | None = None
        self._steps: deque[dict[str, float]] = deque(maxlen=KEPT_FACTS)

    def state_dict(self) -> dict[str, Any]:
        """What was said already, and what later updates are compared with."""
        return {
            "ascent": self._ascent.state_dict(),
            "first_entropy": self._first_entropy,
            "collapsed": self._collapsed,
            "called_small": self._called_small,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        self._ascent.load_state_dict(state["ascent"])
        self._first_entropy = state["first_entropy"]
        self._collapsed = state["collapsed"]
        self._called_small = state["called_small"]

    def facts(self) -> dict[str, Any]:
        """Sizes of the steps, and the comparisons of policy and gradient."""
        return {"steps": list(self._steps), **self._ascent.facts()}

    def on_rollout(self, run: Run, rollout: Rollout) -> Sequence[Verdict]:
        """Before anything is computed: is everything trained that should be, and was every update a step?"""
        return [self._check_trained(run), check_steps(self._begun, self._taken)]

    def on_batch(self, run: Run, batch: PackedBatch) -> None:
        """When an update begins, see what became of the last step."""
        if first_of_update(run):
            self._begun += 1
            self._ascent.begin()
            if self._last is not None:
                before, left, norm = self._last
                self._last = None
                share, since = share_kept(before, left, run.parameters)
                self._ascent.perturbed |= since > 0
                self._kept = check_kept(share, since, norm)
        self._ascent.keep(batch)

    def on_update(self, run: Run, update: Update) -> Sequence[Verdict]:
        """Judge the optimizer before it steps."""
        groups = run.trainer.optimizers[0].param_groups
        rates = [float(group["lr"]) for group in groups]
        self._without_lr = 0 if any(rates) else self._without_lr + 1
        peaks = [float(group.get("initial_lr", group["lr"])) for group in groups]
        allowed = run.thresholds.lr_zero_updates
        verdicts = [
            self._check_trained(run),
            check_learning_rate(rates, peaks, streak=self._without_lr, allowed=allowed),
        ]
        if self._kept is not None:
            verdicts.append(self._kept)
            self._kept = None
        if len(update.evidence) >= run.thresholds.tokens and not self._collapsed:
            verdicts.append(self._check_collapse(update, run.thresholds, run.module.objective.ratio_level))
        return verdicts

    def before_step(self, run: Run, update: Update, optimizer: Optimizer) -> None:
        """Note what the policy says before the step, where that will be compared."""
        self._taken += 1
        self._ascent.before_step(run, update)

    def after_step(self, run: Run, update: Update, step: StepSize) -> Sequence[Verdict]:
        """Judge the step."""
        now = run.trainable
        self._steps.append(
            {"update": run.trainer.global_step, "norm": step.norm, "relative": step.relative, "lr": step.lr}
        )
        verdicts = []
        if (self._taken - 1) % self._every == 0 and processes().count > 1:
            verdicts.append(check_processes(processes().gather(_digest(now))))
        if step.norm == 0:
            return verdicts
        if run.module.policy.has_adapter:
            # All weights a second time would be too much.
            self._last = (step.before, {name: now[name].detach().clone() for name in step.before}, step.norm)
        self._up = self._up + 1 if step.cosine > 0.1 else 0
        verdicts.append(
            check_descends(step.cosine, first=step.first, streak=self._up, allowed=run.thresholds.uphill_updates)
        )
        verdicts.append(self._check_size(step, run.thresholds))
        return [*verdicts, *self._ascent.after_step(run, update, step)]

    def _check_trained(self, run: Run) -> Verdict:
        adapter, trainable = run.module.policy.has_adapter, run.trainable
        base = {name: id(p) for name, p in run.parameters.items() if adapter and ".lora_" not in name}
        if not self._trained:
            self._trained = set(run.parameters if adapter else trainable) - set(base)
        held = {id(p) for group in run.trainer.optimizers[0].param_groups for p in group["params"]}
        return check_trained({name: id(p) for name, p in trainable.items()}, self._trained, held, base)

    def _check_size(self, step: StepSize, thresholds: Thresholds) -> Verdict:
        self._largest_gradient = max(self._largest_gradient, step.gradient_norm)
        # Adam remembers larger gradients: a task that is nearly solved has small steps.
        small = step.relative < thresholds.min_step and step.gradient_norm > 0.1 * self._largest_gradient
        self._small = self._small + 1 if small and not self._called_small else 0
        verdict = check_step_size(
            step.relative,
            min_relative=thresholds.min_step,
            max_relative=step.max_relative,
            small=self._small,
            needed=_SMALL_STEPS,
        )
        self._called_small |= verdict.cause == "step_too_small"
        return verdict

    def _check_collapse(self, update: Update, thresholds: Thresholds, ratio_level: str) -> Verdict:
        evidence = update.evidence
        entropy = float(evidence.entropy.mean())
        self._first_entropy = self._first_entropy or entropy
        clipped = float((evidence.clipped_low | evidence.clipped_high).double().mean())
        kl = float(kl_k3(evidence.logprobs, evidence.logprobs - evidence.log_ratio).mean())
        # The clips of whole sequences are so narrow that most are clipped in a healthy run.
        outside = clipped > 0.5 and ratio_level == "token"
        self._far = self._far + 1 if outside or kl > 1 else 0
        verdict = check_collapse(
            entropy,
            self._first_entropy,
            min_share=thresholds.entropy_share,
            far=self._far,
            far_allowed=thresholds.far_updates,
            clipped=clipped,
            kl=kl,
        )
        self._collapsed = verdict.status is Status.FAIL
        return verdict


def _digest(parameters: Mapping[str, Tensor]) -> dict[str, tuple[float, ...]]:
    return {
        name: (float(p.detach().double().sum()), float(p.detach().double().square().sum()))
        for name, p in parameters.items()
    }
