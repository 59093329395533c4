"""Comparing what a step did to the policy with what its gradient says."""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from grpo_lightning.diagnostics.checks.ascent import POWER, Movement, Noise, check_ascent, check_train_noise, movement
from grpo_lightning.diagnostics.checks.common import uncertain_tokens
from grpo_lightning.diagnostics.checks.step import StepSize
from grpo_lightning.diagnostics.examination import Run
from grpo_lightning.diagnostics.examinations.gradient import KEPT_FACTS
from grpo_lightning.diagnostics.examinations.movement import between, difference_of_two, logprobs_now
from grpo_lightning.diagnostics.rounding import forward_rounding
from grpo_lightning.diagnostics.update import Update
from grpo_lightning.diagnostics.verdict import Status, Verdict
from grpo_lightning.distributed import processes
from grpo_lightning.rollout.batch import PackedBatch

LARGEST_SHARE, FIRST_SHARE, SMALLEST_SHARE = 0.3, 0.01, 1e-5
"""Where a whole step does not follow its gradient, a share of it is compared, and then a tenth of that, as long as the
noise allows. A hundredth of a usual step is small enough; one of a learning rate of 0.2 is still far too large."""

_NOISE_TOKENS = 256
"""Input tokens that are computed twice to see how random the training mode is."""


class Ascent:
    """Keeps the micro-batches of an update that will be compared, and compares it.

    The first comparison is that of the second update that moves anything: in the first one of a fresh adapter only
    half of the parameters have a gradient.

    Args:
        every: Updates that move something from one comparison to the next; fewer until the first that decides.

    Attributes:
        perturbed: Whether parameters were ever changed between two updates.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._since, self._wait = 1, 2
        self._sampler_noise = 0.0
        self._batches: list[PackedBatch] = []
        self._noise = (0.0, 0.0)
        self._told = False
        self._before: Tensor | None = None
        self._series: deque[dict[str, float]] = deque(maxlen=KEPT_FACTS)
        self.perturbed = False

    def state_dict(self) -> dict[str, Any]:
        """Where in the interval the run is, and what was seen and told of noise."""
        return {
            "since": self._since,
            "wait": self._wait,
            "sampler_noise": self._sampler_noise,
            "perturbed": self.perturbed,
            "told": self._told,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        self._since, self._wait = state["since"], state["wait"]
        self._sampler_noise = state["sampler_noise"]
        self.perturbed, self._told = state["perturbed"], state["told"]

    def facts(self) -> dict[str, Any]:
        """Every comparison: the advantage-weighted gain, and the loss's change as predicted and as observed."""
        return {"ascent": list(self._series)}

    @property
    def due(self) -> bool:
        """Whether the present update will be compared, if it moves anything."""
        return self._since >= self._wait

    def begin(self) -> None:
        """Another update begins."""
        self._batches.clear()

    def keep(self, batch: PackedBatch) -> None:
        """Keep a micro-batch of the present update."""
        if self.due:
            self._batches.append(batch)

    def before_step(self, run: Run, update: Update) -> None:
        """What the policy says before the step; the evidence says it unless the training mode is random."""
        self._before = None
        if bool((update.evidence.updates_since_sampling == 0).all()):
            self._sampler_noise = max(self._sampler_noise, _rms(update.evidence.log_ratio))
        gradient = update.evidence.gradient
        if not self._batches or not bool(gradient.isfinite().all() & gradient.any()):
            return
        some = self._batches[0].first_rows(_NOISE_TOKENS)
        train = difference_of_two(run, some, training=True)
        still = difference_of_two(run, some, training=False) if train else 0.0
        self._noise = (train, still)
        self._before = logprobs_now(run, self._batches) if train else update.evidence.logprobs

    def after_step(self, run: Run, update: Update, step: StepSize) -> Sequence[Verdict]:
        """Compare, if it is time."""
        before, self._before = self._before, None
        if before is None:
            self._since += not self.due
            return ()
        evidence, (train, still) = update.evidence, self._noise
        rounding = forward_rounding(run)
        lively = _rms(evidence.log_ratio) > 4 * max(rounding, self._sampler_noise)
        noise = Noise(train, rounding, self.perturbed or lively)
        error = max(rounding, still / 2**0.5)
        gradient = evidence.gradient / processes().count
        change = logprobs_now(run, self._batches) - before
        whole = movement(gradient, change, step.loss_change, error)
        # What cannot be told yet may be told soon: weights and gradients grow at first.
        self._since, self._wait = 1, self._every if whole.decides else min(self._every, 2 * self._wait)
        small = None
        if whole.decides and not whole.agrees:
            small = self._small(run, step, gradient, before, error, whole)
        self._series.append(
            {
                "update": run.trainer.global_step,
                "gain": float((evidence.loss_weight * evidence.advantage * change).sum()),
                "predicted": whole.predicted,
                "observed": whole.observed,
                "se": whole.error,
                "moved": _rms(change),
                "train_noise": train,
            }
        )
        uncertain = uncertain_tokens(evidence.logprobs) >= run.thresholds.tokens
        frozen = uncertain and still == 0 and not bool(change.any())
        verdicts = [check_ascent(whole, small, noise, moved=_rms(change) / (2**0.5 * error), still=frozen)]
        if not self._told:
            declared = run.module.hparams["lora_dropout"] > 0
            verdicts.append(check_train_noise(noise, whole, declared=declared))
            self._told = verdicts[-1].status is Status.FAIL
        return verdicts

    def _small(
        self, run: Run, step: StepSize, gradient: Tensor, before: Tensor, error: float, whole: Movement
    ) -> Movement | None:
        """The first share of the step that follows the gradient, or the smallest; None if all drown in the noise."""
        visible = 1.5 * POWER * whole.error / abs(whole.predicted)
        if visible > LARGEST_SHARE:
            return None
        policy, share = run.module.policy, max(FIRST_SHARE, visible)
        while True:
            with policy._holding(between(step.before, run.trainable, share)):
                change = logprobs_now(run, self._batches) - before
            small = movement(gradient, change, share * step.loss_change, error)
            if small.agrees or share / 10 < max(SMALLEST_SHARE, visible):
                return small
            share /= 10


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt()) if len(values) else 0.0
