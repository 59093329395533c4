"""What is tried of the engine before anything is generated: its base model, and markers published the run's own way."""

import math
import secrets
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from grpo_lightning.adapters import save_adapter
from grpo_lightning.diagnostics.canary import Canary
from grpo_lightning.diagnostics.checks.engine import check_base, check_cache
from grpo_lightning.diagnostics.checks.marker import (
    Fit,
    Hypothesis,
    Marker,
    allowed_mismatch,
    check_markers,
    check_precision,
    fit,
    has_power,
    rms,
)
from grpo_lightning.diagnostics.checks.numbers import check_logprobs
from grpo_lightning.diagnostics.examination import Run
from grpo_lightning.diagnostics.marker import MarkerBench, Weights, families, marker, rounded, scaled
from grpo_lightning.diagnostics.precision import both_exact
from grpo_lightning.diagnostics.prefix_cache import PrefixCache
from grpo_lightning.diagnostics.published import PublishedAdapters
from grpo_lightning.diagnostics.rounding import NOISE, forward_rounding
from grpo_lightning.diagnostics.verdict import Status, Verdict
from grpo_lightning.errors import RolloutError
from grpo_lightning.rollout.types import AdapterRef

_SIZES = (0.3, 0.6, 1.2)
"""Norm of a marker over the norm of the weight that it marks, enlarged until its effect is clear."""

_PRECISION_SIZE = 0.1
_COARSER = (torch.bfloat16, torch.float16)
_FACTORS = (0.0625, 0.125, 0.25, 0.5, 2.0, 4.0, 8.0, 16.0, 32.0)


@dataclass
class Preflight:
    """What was found.

    Attributes:
        canary: What was scored after the noise floor was known, and is enough to follow the policy with.
        noise_floor: RMS difference of trainer and engine at equal weights, nats.
        noise: What the checks reckon with.
        base: The trainer's logprobs of the base model ``[N]``; with full fine-tuning of the policy as it starts.
        trained: The trainer's of the policy ``[N]``.
        served: The engine's of the policy, after it was published again ``[N]``.
        verdicts: The checks' answers.
        markers: Family, and how much of its marker is served.
    """

    canary: Canary
    noise_floor: float
    noise: float
    base: Tensor
    trained: Tensor
    served: Tensor
    verdicts: list[Verdict] = field(default_factory=list)
    markers: list[tuple[str, Fit]] = field(default_factory=list)


def preflight(
    run: Run,
    canary: Canary,
    served: Tensor,
    files: PublishedAdapters | None,
    cache: PrefixCache | None,
    max_mismatch: float,
    judge_precision: bool,
) -> Preflight:
    """Try the engine. It serves the run's own weights again afterwards, whatever happens.

    Args:
        run: The run, its engine synced.
        canary: What is scored.
        served: The engine's logprobs of it with the run's own weights ``[N]``.
        files: Reads back what is written of markers; None if all weights are trained.
        cache: The engine's prefix cache; None if prompts are too short for one.
        max_mismatch: RMS difference in nats of the base models that rounding explains in half precision.
        judge_precision: Whether the engine is meant to keep the adapter in float32.
    """
    policy, own = run.module.policy, canary.trained(run)
    both = _without_adapter(run, canary)
    base = both[0]
    # The first sequence alone is the same tokens in a batch of another shape, on both sides.
    alone = _without_adapter(run, canary.first())
    floor = max(rms(both[1] - base), *(rms(a - b[: len(a)]) for a, b in zip(alone, both, strict=True)))
    exact, limits = both_exact(run), run.thresholds
    allowed = min(max_mismatch, limits.float32_mismatch) if exact else max_mismatch
    noise = min(floor if exact else max(floor, limits.half_noise), allowed)
    said = {"the trainer": torch.cat([base, own]), "the engine": torch.cat([both[1], served])}
    verdicts = [check_logprobs(logprobs, whose) for whose, logprobs in said.items()]
    if exact:
        # Noise of 1e-5 nats or less leaves one sequence more than enough.
        canary = canary.first()
        base, own, served = (logprobs[: len(canary)] for logprobs in (base, own, served))
    found = Preflight(canary, floor, noise, base, own, served, verdicts)
    if policy.has_adapter and _healthy(found):
        found.verdicts.append(check_base(floor, allowed, len(both[0])))
    if not _healthy(found):
        return found
    bench = MarkerBench(run, canary, files)
    try:
        weights = _try_markers(run, bench, found, Marker("start", own, served), cache)
        if policy.has_adapter and judge_precision and _healthy(found):
            found.verdicts.append(_precision(run, bench, weights, noise))
    finally:
        try:
            found.served = bench.restore(own, allowed_mismatch(noise))
        except RolloutError:
            # An engine that was asked for what it never loaded may have died of it: what was found says why.
            if not any(v.status is Status.FAIL for v in found.verdicts):
                raise
    return found


def _healthy(found: Preflight) -> bool:
    return not any(verdict.status is Status.FAIL for verdict in found.verdicts)


def _without_adapter(run: Run, canary: Canary) -> tuple[Tensor, Tensor]:
    """What trainer and engine say of the base model; of the policy as it is, if all its weights are trained."""
    assert run.data is not None
    policy, engine = run.module.policy, run.data.engine
    if not policy.has_adapter:
        return canary.trained(run), canary.served(engine)
    with policy.base():
        trained = canary.trained(run)
    return trained, canary.served(engine, adapter=None)


def _try_markers(
    run: Run, bench: MarkerBench, found: Preflight, start: Marker, cache: PrefixCache | None
) -> dict[str, Weights]:
    """Publish a marker of each kind of module, and judge them, up to one that was written wrong: the engine is not to
    blame for what it does with that."""
    policy = run.module.policy
    weights: dict[str, Weights] = {}
    markers: list[Marker] = []
    for number, (family, names) in enumerate(families(policy).items()):
        weights[family], trained = _clear_marker(bench, run, names, number, found)
        if (wrong := bench.publish(weights[family])) is not None:
            found.verdicts.append(wrong)
            return weights
        markers.append(Marker(family, trained, bench.served()))
        found.markers.append((family, fit(markers[-1], found.base, found.noise)))
        if cache is not None and number == 0:
            cache.fill()
        if cache is not None and number == 1:
            found.verdicts.append(check_cache(*cache.compare(), found.noise, run.thresholds))
    verdict = check_markers(
        found.base,
        start,
        markers,
        found.noise,
        run.thresholds,
        applies=lambda: _applies(run, bench, weights[markers[-1].family], found),
        hypotheses=lambda m: _hypotheses(run, bench, weights[m.family], m),
    )
    found.verdicts.append(verdict)
    return weights


def _clear_marker(
    bench: MarkerBench, run: Run, names: list[str], seed: int, found: Preflight
) -> tuple[Weights, Tensor]:
    """A marker whose effect is clear, if any is, and what the trainer says with it."""
    for size in _SIZES:
        weights = marker(run.module.policy, names, size, seed)
        trained = bench.trained(weights)
        if has_power(rms(trained - found.base), found.noise, run.thresholds):
            break
    return weights, trained


def _precision(run: Run, bench: MarkerBench, weights: dict[str, Weights], noise: float) -> Verdict:
    """A marker of all modules whose values need float32."""
    policy = run.module.policy
    everything = marker(policy, list(policy.trainable_parameters()), _PRECISION_SIZE)
    # A third is exact in no binary precision.
    fine = {name: w * (4 / 3) for name, w in everything.items()}
    if (wrong := bench.publish(fine)) is not None:
        return wrong
    served = bench.served()
    rounding = {str(dtype).removeprefix("torch."): bench.trained(rounded(fine, dtype)) for dtype in _COARSER}
    exact = forward_rounding(run) <= NOISE[torch.float32]
    return check_precision(Marker("all", bench.trained(fine), served), rounding, noise, run.thresholds, exact=exact)


def _applies(run: Run, bench: MarkerBench, weights: Weights, found: Preflight) -> bool | None:
    """Whether the engine shows a marker that is handed to it directly, past the run's publication."""
    assert run.data is not None
    policy, engine = run.module.policy, run.data.engine
    if not policy.has_adapter:
        return None
    effect = rms(bench.trained(weights) - found.base)
    with tempfile.TemporaryDirectory() as folder:
        token = secrets.token_hex(4)
        ref = AdapterRef(f"doctor-{token}", int(token[:7], 16) + 1, Path(folder) / "adapter", run.module.policy_version)
        with policy._holding(weights):
            save_adapter(policy, ref.path)
        try:
            engine.load_adapter(ref)
            served = bench.canary.served(engine, ref)
        except (RolloutError, ValueError, KeyError):
            return None
    return rms(served - found.base) > effect / 2


def _hypotheses(run: Run, bench: MarkerBench, weights: Weights, seen: Marker) -> list[Hypothesis]:
    """What the engine may have done to a marker, each with what it would say then."""
    factor, logprobs = _likeliest_factor(
        lambda f: bench.trained(scaled(run.module.policy, weights, f)), seen.served, _FACTORS
    )
    found = [Hypothesis("adapter_scale", f"the adapter at {factor:.3g} times its size", logprobs)]
    for dtype in _COARSER:
        name = str(dtype).removeprefix("torch.")
        trained = bench.trained(rounded(weights, dtype))
        found.append(Hypothesis("adapter_rounded", f"the adapter rounded to {name}", trained))
        for rounded_first in (False, True) if run.module.policy.has_adapter else ():
            trained = bench.trained_merged(weights, dtype, rounded_first)
            found.append(Hypothesis("merged_rounding", f"the adapter merged into the base in {name}", trained))
    return found


def _likeliest_factor(
    logprobs_at: Callable[[float], Tensor], served: Tensor, factors: Sequence[float], refinements: int = 6
) -> tuple[float, Tensor]:
    """The factor on an adapter that explains best what is served: the best of a few, then halfway to its neighbours."""
    tried = {factor: logprobs_at(factor) for factor in factors}
    step = 2.0

    def best() -> float:
        return min(tried, key=lambda f: rms(served - tried[f]))

    for _ in range(refinements):
        step = math.sqrt(step)
        for factor in (best() * step, best() / step):
            tried.setdefault(factor, logprobs_at(factor))
    return best(), tried[best()]
