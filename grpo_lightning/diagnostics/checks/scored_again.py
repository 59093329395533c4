"""Rewards are those of the completions that they stand beside: a few are computed again."""

from dataclasses import dataclass
from typing import Self

from grpo_lightning.diagnostics.verdict import Status, Verdict

MIN_DIFFERING = 3
"""A single reward that differs may come from a counter or a clock in the function."""

MIN_SHARE = 0.2
"""Least share of those looked at. Rewards that were dealt out anew hit their own value less often, unless nearly all
are alike."""


@dataclass(frozen=True)
class ScoredAgain:
    """Episodes whose rewards were computed again.

    Attributes:
        looked_at: Episodes.
        differing: Those with another stored reward.
        by_chance: Those whose reward was a third one when it was computed once more.
    """

    looked_at: int = 0
    differing: int = 0
    by_chance: int = 0

    def __add__(self, other: Self) -> Self:
        return type(self)(
            self.looked_at + other.looked_at, self.differing + other.differing, self.by_chance + other.by_chance
        )


def check_scored_again(seen: ScoredAgain) -> Verdict:
    """Reward functions give the rewards that are stored.

    Args:
        seen: The run's so far.
    """
    name = "rewards again"
    evidence: dict[str, float | int | str] = {
        "episodes scored again": seen.looked_at,
        "with another reward": seen.differing,
        "needed": MIN_DIFFERING,
    }
    if seen.by_chance:
        return Verdict(name, Status.NO_POWER, "The rewards are not deterministic.", evidence=evidence)
    if seen.looked_at < MIN_DIFFERING:
        return Verdict(name, Status.NO_POWER, f"Only {seen.looked_at} episodes were scored again.", evidence=evidence)
    if seen.differing < max(MIN_DIFFERING, MIN_SHARE * seen.looked_at):
        return Verdict(name, Status.PASS, evidence=evidence)
    return Verdict(
        name,
        Status.FAIL,
        f"Rewards are not those of the completions they stand beside: {seen.differing} of {seen.looked_at} episodes "
        "have another reward than their reward functions give.",
        "Compare rewards and completions of one group by hand (grpo-lightning trajectories). Look at what reorders "
        "episodes or rewards, and at state in the reward functions.",
        evidence,
        cause="rewards_wrong",
        ruled_out=("rewards that are not deterministic (each was computed twice, with one result)",),
    )
