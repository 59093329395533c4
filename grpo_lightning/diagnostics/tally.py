"""Sums over sampled tokens that tell whether they were drawn from the distribution that the trainer computes.

Symbols: ``o`` the trainer's logprob of a token, ``H`` and ``V`` mean and variance of ``-log p`` under its distribution,
``m`` the mass of likelier tokens, ``s`` the sampler's logprob, ``d = s - o``.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

BINS = 200
"""Bins of the histogram over (0, 1)."""

SURPRISAL_CAP = 8.0
"""In nats. A surprisal counts no more than this (or than its expectation) where too much of it is looked for."""

UNCERTAIN_ENTROPY = 0.05
"""In nats. Where the entropy is lower, nothing could show how a token was chosen."""

NOISE_QUANTILE = 0.95

CERTAIN = -1e-6
"""A sampler's logprob above this one says that nothing else could have been chosen."""

UNLIKELY = -2.0
"""A trainer's logprob below this one says that other tokens were likelier."""

FIRST_WINDOW = 512
"""Uncertain tokens of the smallest window."""

LARGEST_WINDOW = 2**17
"""Uncertain tokens of the largest window: a faint fault of an endless run is found no later than here."""


@dataclass(frozen=True)
class Tally:
    """Sums over a window of tokens.

    Attributes:
        tokens: Tokens.
        uncertain: Those with an entropy above `UNCERTAIN_ENTROPY`.
        surprisal: Sum of ``-o``, nats.
        capped: The same of ``min(-o, max(SURPRISAL_CAP, H))``.
        entropy: Sum of ``H``, nats.
        variance: Sum of ``V``, nats squared.
        largest_entropy: Largest ``H``.
        noise: Sum of ``d^2``, where the largest twentieth of each update counts as the next smaller does.
        compared: Tokens with a known ``d``.
        filled: Tokens that the sampler calls certain and the trainer calls unlikely.
        certain_excess: Sum of ``-o - H`` of all tokens that the sampler calls certain, nats.
        certain_variance: Sum of their ``V``, nats squared.
        counts: Histogram of the uncertain tokens' ``m + U p`` with ``U`` uniform: uniform over (0, 1) if all is well.
    """

    tokens: int = 0
    uncertain: int = 0
    surprisal: float = 0.0
    capped: float = 0.0
    entropy: float = 0.0
    variance: float = 0.0
    largest_entropy: float = 0.0
    noise: float = 0.0
    compared: int = 0
    filled: int = 0
    certain_excess: float = 0.0
    certain_variance: float = 0.0
    counts: tuple[int, ...] = (0,) * BINS

    def __add__(self, other: Self) -> Self:
        sums = {name: value + getattr(other, name) for name, value in vars(self).items()}
        sums["largest_entropy"] = max(self.largest_entropy, other.largest_entropy)
        sums["counts"] = tuple(a + b for a, b in zip(self.counts, other.counts, strict=True))
        return type(self)(**sums)

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**vars(self), "counts": list(self.counts)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The tally that gave this state."""
        return cls(**{**state, "counts": tuple(state["counts"])})

    @property
    def noise_rms(self) -> float | None:
        """Root of the mean ``d^2``, nats; None if no ``s`` was known."""
        return math.sqrt(self.noise / self.compared) if self.compared else None

    @property
    def z(self) -> float:
        """How many standard deviations the surprisal lies above its expectation."""
        return (self.surprisal - self.entropy) / math.sqrt(max(self.variance, 1e-12))

    @property
    def certain_z(self) -> float:
        """The same of the tokens that the sampler calls certain alone."""
        return self.certain_excess / math.sqrt(max(self.certain_variance, 1e-12))


def tally(
    logprobs: Tensor,
    entropy: Tensor,
    surprisal_variance: Tensor,
    mass_above: Tensor,
    sampler: Tensor,
    generator: torch.Generator,
) -> Tally:
    """The sums of one update's tokens.

    Args:
        logprobs: ``o``, float64 ``[N]``.
        entropy: ``H``, ``[N]``.
        surprisal_variance: ``V``, ``[N]``.
        mass_above: ``m``, ``[N]``.
        sampler: ``s``, ``[N]``; NaN if unknown.
        generator: Draws the ``U``.
    """
    surprisal = -logprobs
    known = sampler.isfinite()
    squares = (sampler - logprobs)[known].square()
    if len(squares):
        # Not quantile(), which refuses more than 2^24 elements.
        squares = squares.clamp_max(squares.kthvalue(math.ceil(NOISE_QUANTILE * len(squares))).values)
    unsure = entropy > UNCERTAIN_ENTROPY
    certain = sampler > CERTAIN
    draws = torch.rand(len(logprobs), generator=generator, dtype=torch.float64)
    position = (mass_above + draws * logprobs.exp())[unsure].clamp(0, 1)
    counts = torch.bincount((position * BINS).long().clamp_max(BINS - 1), minlength=BINS)
    return Tally(
        tokens=len(logprobs),
        uncertain=int(unsure.sum()),
        surprisal=float(surprisal.sum()),
        capped=float(surprisal.minimum(entropy.clamp_min(SURPRISAL_CAP)).sum()),
        entropy=float(entropy.sum()),
        variance=float(surprisal_variance.sum()),
        largest_entropy=float(entropy.max()) if len(entropy) else 0.0,
        noise=float(squares.sum()),
        compared=int(known.sum()),
        filled=int((certain & (logprobs < UNLIKELY)).sum()),
        certain_excess=float((surprisal - entropy)[certain].sum()),
        certain_variance=float(surprisal_variance[certain].sum()),
        counts=tuple(counts.tolist()),
    )


@dataclass
class Windows:
    """Windows of 512, 1024, ... 131072 uncertain tokens side by side, each size covering the run without gaps.

    A run of ``n`` tokens completes fewer than ``2 n / 512`` windows. Whenever a fault begins, a window that holds
    nothing else and that is a quarter as long as what was sampled since, or the longest, completes in time.
    """

    _open: Tally = field(default_factory=Tally)
    _waiting: list[Tally | None] = field(default_factory=list)

    def add(self, part: Tally) -> Iterator[Tally]:
        """Count further tokens and give every window that they complete, the smallest first."""
        self._open = self._open + part
        if self._open.uncertain < FIRST_WINDOW:
            return
        window, self._open = self._open, Tally()
        yield window
        for size, earlier in enumerate(self._waiting):
            if window.uncertain >= LARGEST_WINDOW:
                return
            if earlier is None:
                self._waiting[size] = window
                return
            window, self._waiting[size] = earlier + window, None
            yield window
        if window.uncertain < LARGEST_WINDOW:
            self._waiting.append(window)

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "open": self._open.state_dict(),
            "waiting": [None if window is None else window.state_dict() for window in self._waiting],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The windows that gave this state."""
        waiting: Sequence[Mapping[str, Any] | None] = state["waiting"]
        return cls(Tally.from_state(state["open"]), [w if w is None else Tally.from_state(w) for w in waiting])
