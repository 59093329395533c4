"""What the checks of a log share."""

from collections.abc import Sequence

from grpo_lightning.diagnostics.foreign.log import Log
from grpo_lightning.diagnostics.verdict import Status, Verdict

ENTRIES = 3
"""Fewer logged values than this decide nothing."""

KL_ENTRIES = 10
"""Fewer logged values of the KL decide nothing: the first steps of a warm-up round away in bfloat16."""

SAME_COMPUTATION = 1e-6
"""Spread of the ratio below which both of its sides come from the same computation: in float32 an engine and a trainer
with the same weights differ by about 1e-5 already."""

ROUNDING = 1e-4
"""Spread of the ratio that rounding alone can make."""

ALL = 0.999
"""Share from which on it is all: averages over processes are rounded."""


def no_power(check: str, why: str, decides: str) -> Verdict:
    """What a log cannot tell, and what would decide."""
    return Verdict(check, Status.NO_POWER, f"{why} {decides}")


def too_few(check: str, what: str, values: Sequence[float]) -> Verdict:
    """The same where too little of it was logged."""
    why = f"The log does not hold {what}." if not values else f"{len(values)} logged values are too few."
    return no_power(check, why, f"Needed: {what} at {ENTRIES} steps or more.")


def varied_groups(log: Log) -> list[bool]:
    """At each logged step, whether rewards differ within any group."""
    if shares := log.finite("group/zero_variance_fraction"):
        return [share < ALL for share in shares]
    return [std > 0 for std in log.finite("reward/std")]
