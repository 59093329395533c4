"""Does the engine show what was published? Told by markers: known weights that leave no doubt.

Shapes: ``N`` tokens of the canary. All log-probabilities are float64.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from grpo_lightning.diagnostics.checks.mismatch import MISMATCH_FACTOR, MISMATCH_MIN
from grpo_lightning.diagnostics.thresholds import Thresholds
from grpo_lightning.diagnostics.verdict import Status, Verdict

NAME = "marker"

_EXPLAINS = 0.3
"""A hypothesis explains a difference if it leaves less than this share of it."""

_HALF = 0.5

_ABOVE_OWN_NOISE = 3.0
"""So many times the noise the effect of rounding must be where part of the noise is the trainer's."""


@dataclass(frozen=True, eq=False)
class Marker:
    """One publication.

    Attributes:
        family: The kind of module that it marks.
        trained: The trainer's logprobs of the canary with these weights ``[N]``.
        served: The engine's after they were published ``[N]``.
    """

    family: str
    trained: Tensor
    served: Tensor

    @property
    def residual(self) -> float:
        """RMS difference, nats."""
        return rms(self.served - self.trained)


@dataclass(frozen=True)
class Fit:
    """How much of a marker the engine shows.

    Attributes:
        slope: Of the engine's change on the trainer's; 1 if all of it.
        se: Its standard error.
        effect: RMS of the trainer's change, nats.
    """

    slope: float
    se: float
    effect: float


@dataclass(frozen=True, eq=False)
class Hypothesis:
    """What the engine may have done to a marker.

    Attributes:
        cause: Its name.
        what: The same for people, as the end of "the engine serves ...".
        logprobs: What it would say of the canary then ``[N]``.
    """

    cause: str
    what: str
    logprobs: Tensor


def rms(values: Tensor) -> float:
    """Root of the mean square."""
    return float(values.square().mean().sqrt())


def fit(marker: Marker, base: Tensor, noise: float) -> Fit:
    """Regress what the engine shows on what the trainer shows, both against the base.

        slope = sum((s - b) (c - b)) / sum((c - b)^2)
        standard error = max(noise, rms of what the slope leaves) / (rms(c - b) sqrt(N))

    Args:
        marker: The publication.
        base: The trainer's logprobs without the marker ``[N]``.
        noise: RMS difference of trainer and engine at equal weights, nats.
    """
    x, y = marker.trained - base, marker.served - base
    effect = rms(x)
    if effect == 0:
        return Fit(math.nan, math.inf, 0.0)
    slope = float((x * y).sum() / x.square().sum())
    left = max(noise, rms(y - slope * x))
    return Fit(slope, left / (effect * math.sqrt(len(x))), effect)


def allowed_mismatch(noise: float) -> float:
    """RMS difference in nats that rounding explains, where `noise` was measured at equal weights."""
    return max(MISMATCH_FACTOR * noise, MISMATCH_MIN)


def has_power(effect: float, noise: float, limits: Thresholds) -> bool:
    """Whether a marker's effect stands out of the noise."""
    return effect > limits.marker_signal * noise


def check_markers(
    base: Tensor,
    start: Marker,
    markers: Sequence[Marker],
    noise: float,
    limits: Thresholds,
    *,
    applies: Callable[[], bool | None] = lambda: None,
    hypotheses: Callable[[Marker], Sequence[Hypothesis]] = lambda marker: (),
) -> Verdict:
    """Every kind of module is served, at its full size, as soon as it is published.

    Args:
        base: The trainer's logprobs without any marker ``[N]``.
        start: What was published before the markers.
        markers: The markers, in the order in which they were published.
        noise: RMS difference of trainer and engine at equal weights, nats.
        limits: Thresholds.
        applies: Whether the engine can apply an adapter at all, if it is loaded past the run's publication; asked only
            where that decides. None if that cannot be told.
        hypotheses: What the engine may have done to a marker; asked only for one that is served in part.
    """
    fits = {m.family: fit(m, base, noise) for m in markers}
    shown: dict[str, float | int | str] = {"noise (nats)": noise, "tokens": len(base)}
    shown |= {f"slope of {name}": f"{f.slope:.4f} +- {f.se:.2g} (effect {f.effect:.2g})" for name, f in fits.items()}
    judged = [m for m in markers if has_power(fits[m.family].effect, noise, limits)]
    if not judged:
        return Verdict(NAME, Status.NO_POWER, _TOO_NOISY, evidence=shown)
    shown |= {"expected slope": 1.0, "allowed deviation": f"max({limits.marker_tolerance:g}, {limits.z:g} SE)"}
    wrong = [m for m in judged if not _is_right(m, fits[m.family], noise, limits)]
    if not wrong:
        return Verdict(NAME, Status.PASS, evidence=shown)
    shown["allowed RMS difference"] = allowed_mismatch(noise)
    states = [start, *markers]
    pattern = _cause_of_pattern(
        states,
        base,
        [states.index(m) for m in judged],
        [states.index(m) for m in wrong],
        limits.marker_signal * noise,
        applies,
    )
    if pattern is not None:
        return _fail(*pattern, shown)
    cause, message, more = _cause_of_size(wrong, fits, hypotheses)
    return _fail(cause, message, shown | more)


_TOO_NOISY = (
    "No marker's effect stands out of the noise between trainer and engine; more canary tokens or an engine in "
    "float32 would decide."
)


def _is_right(marker: Marker, found: Fit, noise: float, limits: Thresholds) -> bool:
    deviation = abs(found.slope - 1)
    return deviation <= max(limits.marker_tolerance, limits.z * found.se) and (
        marker.residual <= allowed_mismatch(noise)
    )


def _origins(states: Sequence[Marker], base: Tensor) -> list[int | None]:
    """Which publication the engine serves after each: its number, -1 for the base model, None for none of them."""
    found: list[int | None] = []
    for index, state in enumerate(states):
        known = {-1: base} | {i: earlier.trained for i, earlier in enumerate(states[: index + 1])}
        distance = {i: rms(state.served - logprobs) for i, logprobs in known.items()}
        nearest = min(distance, key=distance.__getitem__)
        # Whatever is served, a fresh adapter and the base model look alike: the scale is the publication's own effect.
        matches = distance[nearest] <= _EXPLAINS * rms(state.trained - base)
        found.append(nearest if matches else None)
    return found


def _cause_of_pattern(
    states: Sequence[Marker],
    base: Tensor,
    judged: Sequence[int],
    wrong: Sequence[int],
    least: float,
    applies: Callable[[], bool | None],
) -> tuple[str, str] | None:
    """Cause and message, if it shows in which publications are served."""
    fresh_start = rms(states[0].trained - base) <= max(least, MISMATCH_MIN)
    origins = [-1 if fresh_start and o == 0 else o for o in _origins(states, base)]
    start = -1 if fresh_start else 0
    if len(wrong) == len(judged):
        seen = {origins[i] for i in wrong}
        if seen == {-1} and (not fresh_start or applies() is False):
            return "adapter_ignored", "The engine answers as the base model, whatever is published."
        if seen == {start}:
            return "sync_noop", "Publishing changes nothing: the engine goes on serving what it had."
        for late in range(1, len(states)):
            if all(origins[i] == (i - late if i > late else start) for i in wrong):
                return "sync_stale", f"The engine serves what was published {late} publication(s) before, as if new."
    absent = [states[i].family for i in wrong if origins[i] == -1]
    if absent:
        return "adapter_partial", f"The engine applies nothing of the adapter in {', '.join(absent)}."
    return None


def _cause_of_size(
    wrong: Sequence[Marker], fits: Mapping[str, Fit], hypotheses: Callable[[Marker], Sequence[Hypothesis]]
) -> tuple[str, str, dict[str, float | int | str]]:
    """Cause, message and evidence where a publication is served, but not as it is."""
    names = ", ".join(m.family for m in wrong)
    worst = max(wrong, key=lambda m: m.residual)
    shown: dict[str, float | int | str] = {f"RMS difference of {worst.family}": worst.residual}
    best = min(hypotheses(worst), key=lambda h: rms(worst.served - h.logprobs), default=None)
    if best is not None and rms(worst.served - best.logprobs) < _EXPLAINS * worst.residual:
        shown["after that correction"] = rms(worst.served - best.logprobs)
        return best.cause, f"The engine serves {best.what} ({names}).", shown
    if all(fits[m.family].slope < 1 for m in wrong):
        return "adapter_partial", f"The engine applies only a part of the adapter in {names}.", shown
    return "adapter_changed", f"The engine serves another adapter than the trainer's in {names}.", shown


_FIXES = {
    "sync_noop": "Look at LoRAWeightSync.publish and at the engine's load_adapter: a version, name, id or path that "
    "was used before is taken for loaded.",
    "adapter_ignored": "Look at what a request is sent with: the adapter must be part of each, and the engine must be "
    "started with LoRA enabled.",
    "sync_stale": "Look at the order in LoRAWeightSync.publish: weights must be written after the update, and the "
    "engine must have loaded them before it answers. A deliberate delay is declared with max_lag.",
    "adapter_partial": "Look at the engine's log for modules that it skipped, at its list of LoRA targets, and at the "
    "names of the published tensors.",
    "adapter_scale": "Compare r, lora_alpha and use_rslora in the published adapter_config.json with the trainer's.",
    "adapter_rounded": "Keep the adapter in float32 on the way and in the engine (VLLMEngine(lora_dtype='float32')).",
    "merged_rounding": "Serve the adapter beside the base model instead of merging it, or merge in float32.",
    "adapter_changed": "Compare the published tensors with the trainer's, and look for another writer or reader.",
}


def _fail(cause: str, message: str, evidence: Mapping[str, float | int | str]) -> Verdict:
    return Verdict(
        NAME,
        Status.FAIL,
        message,
        _FIXES[cause],
        evidence,
        cause,
        ("a fresh adapter changes nothing either, but a marker is large by construction",),
    )


def check_precision(
    marker: Marker, rounding: Mapping[str, Tensor], noise: float, limits: Thresholds, *, exact: bool
) -> Verdict:
    """The engine keeps the adapter as exactly as it was published.

        kappa = sum((s - c) (c_r - c)) / sum((c_r - c)^2)

    0 if the adapter is served as it is, 1 if it is rounded; ``c_r`` is what the trainer says with the rounded one.

    A trainer whose own forward pass rounds has that in ``c``, and so in both differences: without any effect ``kappa``
    would then be about 1/2. At the effect that is asked for there it is at most 1/9 off.

    Args:
        marker: A publication whose weights need float32.
        rounding: What the trainer says with the adapter rounded, by the name of the dtype, each ``[N]``.
        noise: RMS difference of trainer and engine at equal weights, nats.
        limits: Thresholds.
        exact: Whether rounding in the trainer's own forward pass is far below what it is asked about.
    """
    name = "adapter precision"
    spread = max(noise, min(rms(marker.served - c) for c in (marker.trained, *rounding.values())))
    shown: dict[str, float | int | str] = {"noise (nats)": spread, "tokens": len(marker.trained)}
    found = {}
    least = max(2 * limits.z / math.sqrt(len(marker.trained)), 0.0 if exact else _ABOVE_OWN_NOISE) * spread
    for dtype, logprobs in rounding.items():
        direction = logprobs - marker.trained
        size = rms(direction)
        shown[f"effect of {dtype} (nats)"] = size
        if size > least:
            found[dtype] = float(((marker.served - marker.trained) * direction).sum() / direction.square().sum())
            shown[f"kappa of {dtype}"] = found[dtype]
    if not found:
        reason = "Rounding an adapter changes less here than trainer and engine differ; an engine in float32 decides."
        return Verdict(name, Status.NO_POWER, reason, evidence=shown)
    kappa = max(found.values())
    if not kappa > _HALF:
        return Verdict(name, Status.PASS, evidence=shown)
    dtype = min(rounding, key=lambda d: rms(marker.served - rounding[d]))
    message = f"The engine rounds the adapter to {dtype}, where small updates are lost."
    return Verdict(name, Status.FAIL, message, _FIXES["adapter_rounded"], shown, "adapter_rounded")
