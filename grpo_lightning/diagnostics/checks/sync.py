"""Does the engine follow the policy? Told by a canary: the same tokens scored by both sides at every publication.

Shapes: ``N`` tokens of the canary. All log-probabilities are float64.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from grpo_lightning.diagnostics.checks.marker import allowed_mismatch, rms
from grpo_lightning.diagnostics.thresholds import Thresholds
from grpo_lightning.diagnostics.verdict import Status, Verdict

NAME = "canary"
_HALF = 0.5


@dataclass(frozen=True, eq=False)
class Sighting:
    """What both sides said at one publication.

    Attributes:
        version: The policy's version.
        trained: The trainer's logprobs of the canary ``[N]``.
        served: The engine's ``[N]``.
    """

    version: int
    trained: Tensor
    served: Tensor

    @property
    def mismatch(self) -> float:
        """RMS difference, nats."""
        return rms(self.served - self.trained)


@dataclass(frozen=True)
class Followed:
    """How far the engine went with the policy from one version to another.

        D = c - c_from        alpha = sum((s - c_from) D) / sum(D^2)        SE = noise / (rms(D) sqrt(N))

    Attributes:
        alpha: 1 if entirely, 0 if not at all.
        se: Its standard error.
        pull: ``sum((s - (c + c_from) / 2) D)``: positive if the engine is nearer to the new version than to the old.
        expected: What it is if the engine serves the new one; its negative if it serves the old one. Of ``sum(D^2)``
            only what exceeds the noise of both versions counts.
        variance: Of ``pull``.
    """

    alpha: float
    se: float
    pull: float
    expected: float
    variance: float

    def has_power(self, z: float) -> bool:
        """Whether the new and the old version can be told apart."""
        return self.expected > 0 and self.expected >= z * math.sqrt(self.variance)

    def __add__(self, other: "Followed") -> "Followed":
        """Both measurements together."""
        pull, expected = self.pull + other.pull, self.expected + other.expected
        variance = self.variance + other.variance
        if expected == 0:
            return Followed(math.nan, math.inf, pull, expected, variance)
        alpha, se = _HALF + pull / (2 * expected), math.sqrt(variance) / (2 * expected)
        return Followed(alpha, se, pull, expected, variance)


NOTHING = Followed(math.nan, math.inf, 0.0, 0.0, 0.0)


def followed(served: Tensor, start: Tensor, current: Tensor, noise: float) -> Followed:
    """How far the engine went with the policy (`Followed`).

    Args:
        served: The engine's logprobs now ``[N]``.
        start: The trainer's at an earlier version ``[N]``.
        current: The trainer's now ``[N]``.
        noise: RMS difference of trainer and engine at equal weights, nats.
    """
    change = current - start
    size = float(change.square().sum())
    if size == 0:
        return NOTHING
    return Followed(
        alpha=float(((served - start) * change).sum()) / size,
        se=noise / math.sqrt(size),
        pull=float(((served - (current + start) / 2) * change).sum()),
        expected=max(0.0, size - 2 * len(change) * noise**2) / 2,
        variance=noise**2 * size,
    )


def recalibrated(now: Sighting, others: Sequence[Tensor], noise: float) -> float:
    """The noise as it is now: the least difference to any weights that the engine may serve, at least the first noise.

    Args:
        now: The latest publication.
        others: The trainer's logprobs of everything else that may be served.
        noise: As it was measured at the start.
    """
    return max(noise, min(rms(now.served - logprobs) for logprobs in (now.trained, *others)))


def check_canary(
    now: Sighting,
    earlier: Sequence[Sighting],
    base: Tensor | None,
    noise: float,
    together: Followed,
    limits: Thresholds,
) -> Verdict:
    """The engine serves the policy of now, not one of before.

    Args:
        now: The latest publication.
        earlier: Those before it, the latest last.
        base: The trainer's logprobs of the base model ``[N]``; None if all weights are trained.
        noise: RMS difference of trainer and engine at equal weights, nats.
        together: The last steps' measurements that were not decided yet, with this one.
        limits: Thresholds.
    """
    starts = {sighting.version: sighting.trained for sighting in earlier}
    spread = recalibrated(now, [*starts.values(), *([] if base is None else [base])], noise)
    seen = {version: followed(now.served, start, now.trained, spread) for version, start in starts.items()}
    from_base = NOTHING if base is None else followed(now.served, base, now.trained, spread)
    allowed = allowed_mismatch(noise)
    shown: dict[str, float | int | str] = {
        "RMS difference (nats)": now.mismatch,
        "allowed": allowed,
        "noise (nats)": spread,
        "tokens": len(now.trained),
    }
    if earlier:
        shown["alpha (against the version before)"] = seen[earlier[-1].version].alpha
        shown["standard error of alpha"] = seen[earlier[-1].version].se
    if base is not None:
        shown["beta (against the base model)"], shown["standard error of beta"] = from_base.alpha, from_base.se
    shown["expected"] = 1.0
    judged = [f for f in (*seen.values(), from_base) if f.has_power(limits.z)]
    behind = [f for f in judged if abs(f.alpha - 1) > limits.canary_tolerance + limits.z * f.se]
    late_together = together.has_power(limits.z) and together.pull < 0
    if behind or late_together or not now.mismatch <= allowed:
        shown["alpha of the last versions together"] = together.alpha
        return _named(now, earlier, base, late_together and not behind, shown)
    if judged or together.has_power(limits.z):
        return Verdict(NAME, Status.PASS, evidence=shown)
    why = f"The policy moved too little since the last publication to be told from noise of {spread:.2g} nats"
    return Verdict(NAME, Status.NO_POWER, f"{why}; more versions, or an engine in float32, decide.", evidence=shown)


def _named(
    now: Sighting,
    earlier: Sequence[Sighting],
    base: Tensor | None,
    late_together: bool,
    shown: Mapping[str, float | int | str],
) -> Verdict:
    known = {-1: base} if base is not None else {}
    known |= {s.version: s.trained for s in earlier} | {now.version: now.trained}
    nearest = min(known, key=lambda version: rms(now.served - known[version]))
    before = next((s for s in reversed(earlier)), None)
    moved = 0.0 if before is None else rms(now.trained - before.trained)
    if before is not None and moved > 0 and rms(now.served - before.served) < 0.1 * moved:
        cause, message = "sync_noop", "The engine answers as before the publication, although the policy has changed."
    elif late_together or nearest not in (-1, now.version):
        which = before.version if before is not None and late_together else nearest
        cause, message = "sync_stale", f"The engine serves version {which} and reports version {now.version}."
    elif nearest == -1:
        cause, message = "adapter_ignored", "The engine answers as the base model."
    else:
        cause, message = "other_weights", "The engine serves neither the policy, nor an earlier version, nor the base."
    fix = (
        "Look at LoRAWeightSync.publish: does it write the weights after the update, under a name, id and path that "
        "were never used, and does the engine load them before it answers? A deliberate delay is declared with max_lag."
    )
    ruled_out = ("a declared lag: the engine is compared with the version that it reports",)
    return Verdict(NAME, Status.FAIL, message, fix, dict(shown), cause, ruled_out)
