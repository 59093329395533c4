"""Tokens are drawn from the very distribution that the trainer computes.

Every bound here holds for any number of tokens and any distributions (Bernstein's inequality for sums, Chernoff's for
counts, the Dvoretzky-Kiefer-Wolfowitz inequality), so windows may be judged one after the other all through a run.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_lightning.diagnostics.tally import BINS, SURPRISAL_CAP, UNLIKELY, Tally
from grpo_lightning.diagnostics.thresholds import Thresholds
from grpo_lightning.diagnostics.verdict import Status, Verdict

TAILS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
"""Where the tails begin whose shares are tested."""

NOISE_BIAS = 2.0
"""Noise of rms ``e`` nats between sampler and trainer shifts the mean surprisal by about ``e^2``: they differ, and the
tokens come from one of them. Twice that is allowed, else 5.3 standard deviations would be reached by 7 million tokens
in bfloat16."""

TAIL_TOLERANCE = 0.25
"""A tail's share may differ by this part of it without meaning: equal logits in bfloat16, and noise."""

SHAPE_TOLERANCE = 0.03
"""The same for the distribution function of all: equal logits in bfloat16, an eighth apart, shift it by 0.016."""

UNKNOWN_NOISE = 0.1
"""Nats of noise to reckon with where the sampler's logprobs are unknown."""

MOST_NOISE = 0.3
"""Nats beyond which a difference between sampler and trainer is no noise."""

MIN_FILLED = 3
"""Tokens that are certain to the sampler and unlikely to the trainer which decide. One that is certain to both, with a
logprob of exactly 0, is none of them."""

FILLED_SHARE = 1e-5
"""Share of all tokens up to which they decide nothing, however many they become in a long run: a router or an attention
kernel that decides otherwise once in 100,000 tokens is no fault of the data."""

MAX_CHOSEN = 2.0
"""Standard deviations of surprisal above the entropy up to which the policy's own choice is the likelier explanation of
tokens with a logprob of 0. Chance exceeds it once in 44 times; three forced tokens, each 5 nats above the entropy,
reach 4."""

_TITLES = {
    "sharpened_sampling": "Tokens were drawn from a sharper distribution than the trainer's: likely ones too often.",
    "truncated_sampling": "Unlikely tokens are never sampled, although the trainer's distribution has them.",
    "foreign_tokens": "Tokens are less likely than the policy's own would be: not all were drawn from it.",
}
_FIXES = {
    "sharpened_sampling": "Is the engine's temperature lower than the data module's, or is there a penalty or a bias "
    "on its logits? Both must be what the trainer computes with.",
    "truncated_sampling": "Switch off top_p, top_k and min_p in the engine, also in its generation_config.json: the "
    "trainer cannot see them, and its ratios are wrong.",
    "foreign_tokens": "Look for tokens of the environment, forced or retokenised ones among the trained tokens, and "
    "for an engine with a higher temperature.",
}
_RULED_OUT = (
    "chance (its bound is shown)",
    "rounding noise, which is allowed for",
    "a stale adapter alone, which does not sharpen",
)


@dataclass(frozen=True)
class _Test:
    chance: float
    cause: str
    shown: dict[str, float | int | str]


def check_distribution(window: Tally, thresholds: Thresholds) -> Verdict:
    """The tokens of a window were drawn from the trainer's distribution.

    Three statistics: the mean surprisal against the entropy, the share of tokens in the tails of the distribution, and
    the distribution function of ``m + U p``. Together they fail a healthy window with a probability below that of
    ``thresholds.z`` standard errors.

    Args:
        window: The tokens, sampled with the weights that the trainer's numbers were computed with.
        thresholds: The doctor's limits.
    """
    name = "sampling distribution"
    if window.uncertain < thresholds.tokens:
        return Verdict(
            name,
            Status.NO_POWER,
            f"Only {window.uncertain} fresh tokens were not certain; needs {thresholds.tokens}.",
        )
    rms = window.noise_rms
    noise = UNKNOWN_NOISE if rms is None else min(rms, MOST_NOISE)
    counts = torch.tensor(window.counts, dtype=torch.float64)
    tests = [*_surprisal(window, noise), *_tails(counts, noise), *_shape(counts, noise)]
    worst = min(tests, key=lambda test: test.chance)
    chance = min(1.0, worst.chance * len(tests))
    allowed = math.erfc(thresholds.z / math.sqrt(2))
    evidence: dict[str, float | int | str] = {
        "tokens": window.tokens,
        "mean surprisal": window.surprisal / window.tokens,
        "expected": window.entropy / window.tokens,
        "standard deviations": window.z,
        **worst.shown,
        "chance in a healthy run": chance,
        "allowed": allowed,
    }
    if chance >= allowed:
        return Verdict(name, Status.PASS, evidence=evidence)
    cause = worst.cause
    if cause == "sharpened_sampling" and (cut := truncated_at(counts)) is not None:
        cause = "truncated_sampling"
        evidence["mass that is kept, about"] = cut
    return Verdict(name, Status.FAIL, _TITLES[cause], _FIXES[cause], evidence, cause=cause, ruled_out=_RULED_OUT)


def check_filled(window: Tally) -> Verdict:
    """Hardly any token is certain to the sampler and unlikely to the trainer.

    Of tokens that the policy did choose, only the logprobs were lost: their surprisal is about the entropy. Tokens that
    were put in its place are far above.

    Args:
        window: The fresh tokens so far in the run.
    """
    filled, z = window.filled, window.certain_z
    allowed = max(MIN_FILLED - 1, int(FILLED_SHARE * window.tokens))
    evidence: dict[str, float | int | str] = {
        "tokens": filled,
        "allowed": allowed,
        "trained tokens": window.tokens,
        "share of them": filled / max(1, window.tokens),
        "share allowed in long runs": FILLED_SHARE,
    }
    if filled <= allowed:
        return Verdict("token sources", Status.PASS, evidence=evidence)
    evidence |= {
        "their surprisal above the entropy, in standard deviations": z,
        "chosen by the policy up to": MAX_CHOSEN,
    }
    found = (
        f"{filled} of {window.tokens} trained tokens have a stored logprob of 0, but the trainer finds them unlikely"
    )
    rounding = f"rounding, which makes no token of a probability below {math.exp(UNLIKELY):.2g} certain"
    if z <= MAX_CHOSEN:
        return Verdict(
            "sampler logprobs",
            Status.FAIL,
            f"{found}. They surprise it no more than the policy's own choices do: missing logprobs were most likely "
            "filled in with zeros.",
            "A missing logprob must stop the run, not become 0. Look where the engine's output is turned into actions. "
            "If a rule put these tokens in the policy's place, give them the source FORCED instead.",
            evidence,
            cause="logprobs_zero",
            ruled_out=(rounding,),
        )
    return Verdict(
        "token sources",
        Status.FAIL,
        f"{found}: the policy did not choose them.",
        "Forced tokens, and the environment's, must not be among the sampled ones, and their logprobs must not be "
        "filled in. Look where actions become trajectories.",
        evidence,
        cause="forced_in_mask",
        ruled_out=(rounding, "lost logprobs of sampled tokens, which surprise the policy no more than expected"),
    )


def _surprisal(window: Tally, noise: float) -> list[_Test]:
    """Bernstein's inequality for the sum of ``-o - H`` in both directions."""
    bias = NOISE_BIAS * noise**2 * window.tokens
    shown: dict[str, float | int | str] = {"allowed for noise, nats": NOISE_BIAS * noise**2}
    return [
        _Test(
            bernstein(window.entropy - window.surprisal - bias, window.variance, window.largest_entropy),
            "sharpened_sampling",
            shown,
        ),
        _Test(
            bernstein(window.capped - window.entropy - bias, window.variance, SURPRISAL_CAP), "foreign_tokens", shown
        ),
    ]


def bernstein(excess: float, variance: float, largest: float) -> float:
    """Bound for the probability that a sum with mean 0 exceeds ``excess``.

        exp(-excess^2 / (2 (variance + largest excess / 3)))

    Args:
        excess: The sum.
        variance: Of the sum.
        largest: No term is larger.
    """
    if excess <= 0:
        return 1.0
    return math.exp(-(excess**2) / (2 * (variance + largest * excess / 3)))


def _tails(counts: Tensor, noise: float) -> list[_Test]:
    """Chernoff's bound for the numbers beyond each of `TAILS`."""
    n = int(counts.sum())
    tolerance = min(0.9, TAIL_TOLERANCE + noise)
    tests = []
    for tail in TAILS:
        beyond = int(counts[round(tail * BINS) :].sum())
        shown: dict[str, float | int | str] = {f"beyond {tail} of the mass": beyond, "expected there": n * (1 - tail)}
        few = binomial_at_most(beyond, n, (1 - tail) * (1 - tolerance))
        many = binomial_at_most(n - beyond, n, 1 - min(1 - 1e-9, (1 - tail) * (1 + tolerance)))
        tests += [_Test(few, "sharpened_sampling", shown), _Test(many, "foreign_tokens", shown)]
    return tests


def binomial_at_most(count: int, trials: int, chance: float) -> float:
    """Chernoff's bound for the probability of ``count`` or fewer successes.

        exp(-n (q ln(q / p) + (1 - q) ln((1 - q) / (1 - p)))),  q = count / n

    Args:
        count: Successes.
        trials: ``n``.
        chance: ``p``, in (0, 1).
    """
    if count >= trials * chance:
        return 1.0
    share = count / trials
    likelier = share * math.log(share / chance) if count else 0.0
    return math.exp(-trials * (likelier + (1 - share) * math.log((1 - share) / (1 - chance))))


def _shape(counts: Tensor, noise: float) -> list[_Test]:
    """The Dvoretzky-Kiefer-Wolfowitz inequality in both directions."""
    n = float(counts.sum())
    edges = torch.arange(1, BINS + 1, dtype=torch.float64) / BINS
    gap = counts.cumsum(0) / n - edges
    tests = []
    for distance, cause in ((float(gap.max()), "sharpened_sampling"), (float(-gap.min()), "foreign_tokens")):
        shown: dict[str, float | int | str] = {"largest distance from uniform": distance}
        excess = max(0.0, distance - SHAPE_TOLERANCE - noise**2)
        tests.append(_Test(math.exp(-2 * n * excess**2), cause, shown))
    return tests


def truncated_at(counts: Tensor) -> float | None:
    """The mass that a truncated sampler keeps, if truncation fits better than a lower temperature.

    Truncation leaves ``u = m + U p`` uniform below the mass that is kept; a lower temperature makes ``1 - u`` a power
    of what it was, since tails of distributions fall about like powers. The likelier of both is taken.

    Args:
        counts: Histogram of ``u``, float64 ``[BINS]``.
    """
    n = counts.sum()
    below = counts.cumsum(0)[:-1]
    edge = torch.arange(1, BINS, dtype=torch.float64) / BINS
    cut = torch.special.xlogy(below, below / (n * edge)) + torch.special.xlogy(
        n - below, (n - below) / (n * (1 - edge))
    )
    # A cut that leaves a fifth of what should be beyond it is none.
    cut = cut.masked_fill((n - below) > 0.2 * n * (1 - edge), -torch.inf)
    left = 1 - (torch.arange(BINS, dtype=torch.float64) + 0.5) / BINS
    power = n / -(counts * left.log()).sum()
    sharper = n * power.log() + (power - 1) * (counts * left.log()).sum()
    best = int(cut.argmax())
    return float(edge[best]) if float(cut[best]) > float(sharper) else None
