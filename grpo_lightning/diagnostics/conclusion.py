"""From verdicts to the one cause, what it explains, and the words for it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from grpo_lightning.diagnostics.causes import BY_NAME, ORDER, Reaction
from grpo_lightning.diagnostics.verdict import Status, Verdict

REACTIONS: tuple[Reaction, ...] = ("halt", "warn", "log")
"""From the strongest to the weakest."""


@dataclass(frozen=True)
class Diagnosis:
    """Verdicts of one moment in causal order.

    Attributes:
        root: The first cause.
        explained: Later failures, which it explains.
        passed: Names of the checks that passed each time.
        silent: Verdicts that had no power.
        reaction: What to do.
    """

    root: Verdict
    explained: tuple[Verdict, ...]
    passed: tuple[str, ...]
    silent: tuple[Verdict, ...]
    reaction: Reaction

    def __str__(self) -> str:
        """The same text in exception, warning, log and report."""
        lines = [str(self.root)]
        if self.explained:
            lines.append("Explained by it: " + "; ".join(f"{v.check} ({title(v)})" for v in self.explained) + ".")
        lines.append(f"Checks passed: {', '.join(self.passed) or 'none'}.")
        if self.silent:
            lines.append(f"Checks that could not tell: {'; '.join(f'{v.check} ({v.message})' for v in self.silent)}")
        return "\n".join(lines)


def title(verdict: Verdict) -> str:
    """A failed verdict's cause in a few words."""
    return BY_NAME[verdict.cause].title if verdict.cause else verdict.message


def reaction_to(verdict: Verdict, reactions: Mapping[str, Reaction]) -> Reaction:
    """What to do about a failed verdict.

    Args:
        verdict: The verdict.
        reactions: What was chosen, by name of a cause, of a check, or ``"all"``; the first of these wins.
    """
    chosen = next((reactions[key] for key in (verdict.cause, verdict.check, "all") if key in reactions), None)
    return chosen or BY_NAME[verdict.cause].reaction


def diagnose(verdicts: Sequence[Verdict], reactions: Mapping[str, Reaction]) -> Diagnosis | None:
    """Put verdicts in causal order; None if none failed.

    A cause that halts goes before one that does not: what is surely wrong explains what looks odd, not the reverse.

    Args:
        verdicts: All verdicts of one moment.
        reactions: As for `reaction_to`.
    """
    failed = sorted(
        (v for v in verdicts if v.status is Status.FAIL),
        key=lambda v: (REACTIONS.index(reaction_to(v, reactions)), ORDER[v.cause]),
    )
    if not failed:
        return None
    wrong = {v.check for v in failed}
    return Diagnosis(
        root=failed[0],
        explained=tuple(failed[1:]),
        passed=tuple(v.check for v in verdicts if v.status is Status.PASS and v.check not in wrong),
        silent=tuple(v for v in verdicts if v.status is Status.NO_POWER),
        reaction=reaction_to(failed[0], reactions),
    )
