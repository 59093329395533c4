"""The answer of a check."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


class Status(Enum):
    """What a check can say."""

    PASS = "pass"
    FAIL = "fail"
    NO_POWER = "no power"


@dataclass(frozen=True)
class Verdict:
    """One check's answer with its evidence.

    Attributes:
        check: Name of the check.
        status: Passed, failed, or the data cannot tell.
        message: What is wrong, or why the data cannot tell and what would decide.
        fix: Where to look and what to do.
        evidence: The measured values and the thresholds they were held against.
        cause: Name of what is wrong, one of `causes.CAUSES`; empty unless the check failed.
        ruled_out: Healthy runs that look alike, each with what tells it apart here.
    """

    check: str
    status: Status
    message: str = ""
    fix: str = ""
    evidence: Mapping[str, float | int | str] = field(default_factory=dict)
    cause: str = ""
    ruled_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [self.message, *(f"  {name}: {_format(value)}" for name, value in self.evidence.items())]
        if self.fix:
            lines.append(f"Fix: {self.fix}")
        if self.ruled_out:
            lines.append(f"Not the cause: {'; '.join(self.ruled_out)}.")
        return "\n".join(lines)


def _format(value: float | int | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
