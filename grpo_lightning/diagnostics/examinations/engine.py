"""What the engine really serves: markers before the first rollout, a canary at every publication."""

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from grpo_lightning.diagnostics.base_weights import BaseWeights
from grpo_lightning.diagnostics.canary import Canary, make_canary
from grpo_lightning.diagnostics.checks.engine import check_base_weights, check_cache
from grpo_lightning.diagnostics.checks.mismatch import MAX_MISMATCH
from grpo_lightning.diagnostics.checks.step import StepSize
from grpo_lightning.diagnostics.checks.sync import NOTHING, Sighting, check_canary, followed, recalibrated
from grpo_lightning.diagnostics.examination import Examination, Run
from grpo_lightning.diagnostics.examinations.gradient import KEPT_FACTS
from grpo_lightning.diagnostics.precision import adapter_dtype
from grpo_lightning.diagnostics.prefix_cache import PrefixCache
from grpo_lightning.diagnostics.preflight import Preflight, preflight
from grpo_lightning.diagnostics.published import PublishedAdapters
from grpo_lightning.diagnostics.update import Update
from grpo_lightning.diagnostics.verdict import Status, Verdict
from grpo_lightning.distributed import processes
from grpo_lightning.errors import RolloutError

CANARY_TOKENS = 64
"""On the demo model in float32 one update moves these tokens so far that alpha has a standard error of 3e-5; more would
cost more than 1% of an epoch."""

CACHE_EVERY = 32
"""An engine that mixes up its caches does so from the first publications on."""

_KEPT = 64
_CACHE_CONTEXT = 48
"""Shorter contexts hardly fill a block of vLLM's cache on CPU."""


class EngineExamination(Examination):
    """Compares what the engine says of a few tokens with what the trainer says of them.

    Before anything is generated (pre-flight): the base model on both sides, which gives the noise floor; a marker for
    each kind of module, published the run's own way; the precision of the adapter; the prefix cache. At every
    publication: the canary, what was published, and the frozen weights.

    Args:
        canary_tokens: About how many tokens are compared.
        max_mismatch: Largest RMS difference in nats between the base models of trainer and engine.

    Attributes:
        noise_floor: RMS difference of trainer and engine at equal weights, nats; None until it was measured.
    """

    name = "engine"

    def __init__(self, canary_tokens: int = CANARY_TOKENS, max_mismatch: float = MAX_MISMATCH) -> None:
        self._tokens = canary_tokens
        self._max_mismatch = max_mismatch
        self.reset()

    def reset(self) -> None:
        """Forget an earlier run."""
        self.noise_floor: float | None = None
        self._canary: Canary | None = None
        self._found: Preflight | None = None
        self._refuses = False
        self._cache: PrefixCache | None = None
        self._base_weights: BaseWeights | None = None
        self._published: PublishedAdapters | None = None
        self._sightings: list[Sighting] = []
        self._together = NOTHING
        self._syncs = 0
        self._seconds = 0.0
        self._curve: deque[dict[str, Any]] = deque(maxlen=KEPT_FACTS)

    def facts(self) -> dict[str, Any]:
        """Noise floor, canary and markers."""
        markers = [] if self._found is None else self._found.markers
        return {
            "noise_floor": self.noise_floor,
            "canary": list(self._curve),
            "markers": [
                {"family": name, "slope": _number(f.slope), "se": _number(f.se), "effect": f.effect}
                for name, f in markers
            ],
            "preflight_seconds": self._seconds,
        }

    def on_sync(self, run: Run) -> Sequence[Verdict]:
        """What was written for the engine, then pre-flight on the first publication and the canary on all."""
        if run.data is None or run.sync is None:
            return ()
        begin = time.perf_counter()
        verdicts = self._written(run)
        try:
            if self._refuses or not hasattr(run.data.engine, "score"):
                self._refuses = True
                verdicts.append(_cannot_score(run.data.engine))
            elif self._found is None:
                self._preflight(run, verdicts)
                self._seconds = time.perf_counter() - begin
            else:
                self._follow(run, verdicts)
        except RolloutError:
            # What was written wrong may be more than an engine survives.
            if not _failed(verdicts):
                raise
        return verdicts

    def _written(self, run: Run) -> list[Verdict]:
        """Needs no engine, and explains all that one does with what is wrong here."""
        policy = run.module.policy
        if not policy.has_adapter:
            return []
        if self._published is None:
            self._published = PublishedAdapters(adapter_dtype(run))
        resolution = self._published.resolution(run)
        return [self._published.written(run), *([] if resolution is None else [resolution])]

    def _preflight(self, run: Run, verdicts: list[Verdict]) -> None:
        """Add what is found before anything is generated."""
        assert run.data is not None
        engine = run.data.engine
        canary = make_canary(run.data, self._tokens)
        try:
            served = canary.served(engine)
        except NotImplementedError:
            self._refuses = True
            verdicts.append(_cannot_score(engine))
            return
        if run.module.policy.has_adapter:
            self._base_weights = BaseWeights(run.module.policy)
        context = run.data.sampler.max_context
        self._cache = PrefixCache(engine, canary, context) if context >= _CACHE_CONTEXT else None
        found = preflight(
            run,
            canary,
            served,
            self._published,
            self._cache,
            self._max_mismatch,
            judge_precision=adapter_dtype(run) in (None, torch.float32),
        )
        self._found, self.noise_floor = found, found.noise_floor
        self._canary = found.canary
        verdicts += [*found.verdicts, *self._frozen(run)]
        self._add_canary(verdicts, self._judge(run, found.served, found.trained))

    def _follow(self, run: Run, verdicts: list[Verdict]) -> None:
        """Add what is found at a later publication."""
        assert run.data is not None
        assert self._canary is not None
        assert self._found is not None
        self._syncs += 1
        verdicts += self._frozen(run)
        served = self._canary.served(run.data.engine)
        self._add_canary(verdicts, self._judge(run, served, self._canary.trained(run)))
        if self._cache is not None and self._syncs % CACHE_EVERY == 1:
            verdicts.append(check_cache(*self._cache.compare(), self._found.noise, run.thresholds))

    @staticmethod
    def _add_canary(verdicts: list[Verdict], canary: Verdict) -> None:
        """Where something dearer or more exact says what is wrong, the canary sees its effects alone."""
        if not _failed(verdicts):
            verdicts.append(canary)

    def _frozen(self, run: Run) -> list[Verdict]:
        if self._base_weights is None:
            return []
        return [check_base_weights(*self._base_weights.changed(run.module.policy))]

    def _judge(self, run: Run, served: torch.Tensor, trained: torch.Tensor) -> Verdict:
        """The canary: does the engine serve the version that it reports?"""
        assert self._found is not None
        assert run.data is not None
        version, declared = run.module.policy_version, run.data.engine.policy_version
        known = {s.version: s.trained for s in self._sightings} | {version: trained}
        if declared not in known:
            reason = f"The engine reports version {declared}, which was never published before now."
            return Verdict("canary", Status.NO_POWER, reason)
        now = Sighting(declared, known[declared], served)
        base = self._found.base if run.module.policy.has_adapter else None
        earlier = [s for s in self._sightings if s.version != declared]
        self._note(now, earlier, base)
        verdict = check_canary(now, earlier, base, self._found.noise, self._together, run.thresholds)
        if self._together.has_power(run.thresholds.z):
            self._together = NOTHING
        self._sightings = [*earlier, Sighting(version, trained, served)][-_KEPT:]
        return verdict

    def _note(self, now: Sighting, earlier: Sequence[Sighting], base: torch.Tensor | None) -> None:
        """Add the latest step to those that are not decided, and to the curve."""
        assert self._found is not None
        others = [s.trained for s in earlier] + ([] if base is None else [base])
        noise = recalibrated(now, others, self._found.noise)
        step = followed(now.served, earlier[-1].trained, now.trained, noise) if earlier else NOTHING
        from_base = NOTHING if base is None else followed(now.served, base, now.trained, noise)
        self._together += step
        self._curve.append(
            {
                "version": now.version,
                "alpha": _number(step.alpha),
                "alpha_se": _number(step.se),
                "beta": _number(from_base.alpha),
                "beta_se": _number(from_base.se),
                "mismatch": now.mismatch,
            }
        )

    def after_step(self, run: Run, update: Update, step: StepSize) -> Sequence[Verdict]:
        """Log in all processes what the first measured."""
        for name, value in processes().from_first(self._measured).items():
            run.module.log(name, value, on_step=True, on_epoch=False)
        return ()

    def _measured(self) -> dict[str, float]:
        alpha = self._curve[-1]["alpha"] if self._curve else None
        values = {"mismatch/noise_floor": self.noise_floor, "sync/canary_alpha": alpha}
        return {name: value for name, value in values.items() if value is not None}


def _failed(verdicts: Sequence[Verdict]) -> bool:
    return any(verdict.status is Status.FAIL for verdict in verdicts)


def _cannot_score(engine: object) -> Verdict:
    reason = f"{type(engine).__name__} cannot score tokens: what it serves stays unknown."
    return Verdict("canary", Status.NO_POWER, reason)


def _number(value: float) -> float | None:
    """A number that JSON knows."""
    return value if value - value == 0 else None
