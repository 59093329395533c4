"""What the sampler's logprobs may be instead of what they should be, each with the values that it predicts.

Shapes: ``N`` sampled tokens, ``C`` tokens of a chunk, ``V`` vocabulary. Symbols: ``s`` the sampler's logprob of a
token, ``o`` the trainer's with the same weights, ``h`` what a hypothesis predicts for ``s``.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

TEMPERATURES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.5, 2.0)
TOP_P = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
TOP_K = (5, 10, 20, 40, 50, 100)
MIN_P = (0.01, 0.02, 0.05, 0.1)

SHIFTS = (-2, -1, 1, 2)

OUTSIDE = 0.02
"""Part of the tokens that may lie outside a truncation's kept set by rounding."""


@dataclass(frozen=True)
class Hypothesis:
    """One thing that the sampler's logprobs may be.

    Attributes:
        cause: Which of `causes.CAUSES` it would be.
        share: Which share of `attribution.SHARES` it explains.
        name: The same for people.
        logprobs: What it predicts, float64 ``[N]``; NaN where it says nothing.
        alphas: Least and largest part of ``h - o`` that the sampler's ``s - o`` may be.
        inverse_temperatures: The trainer's and the hypothesis's ``1 / T``, if it is another temperature.
    """

    cause: str
    share: str
    name: str
    logprobs: Tensor
    alphas: tuple[float, float] = (0.5, 1.5)
    inverse_temperatures: tuple[float, float] | None = None


def at_temperature(distributions: Iterable[Tensor], temperature: float) -> Iterator[Tensor]:
    """Scale log-probabilities at temperature 1, chunks ``[C, V]``, to another temperature."""
    for logp_CV in distributions:
        yield logp_CV if temperature == 1.0 else (logp_CV / temperature).log_softmax(-1)


def of_distributions(
    distributions: Iterable[Tensor], targets_N: Tensor, temperature: float
) -> tuple[Tensor, list[Hypothesis]]:
    """The trainer's logprobs ``o``, and what follows from the whole distributions: temperatures and truncations.

    Args:
        distributions: Log-probabilities at ``temperature``, in chunks ``[C, V]``.
        targets_N: The sampled tokens, int64 ``[N]``.
        temperature: The sampling temperature.
    """
    parts: dict[tuple[str, float], list[Tensor]] = {}
    start = 0
    for logp_CV in distributions:
        targets_C1 = targets_N[start : start + len(logp_CV), None]
        start += len(logp_CV)
        for key, values_C in _chunk(logp_CV, targets_C1, temperature).items():
            parts.setdefault(key, []).append(values_C.double().cpu())
    joined = {key: torch.cat(values) for key, values in parts.items()}
    o = joined.pop(("o", 0.0))
    found = []
    for (kind, value), logprobs in joined.items():
        if kind == "temperature":
            cause = "raw_logprobs" if value == 1.0 else "wrong_temperature"
            # Between those that are tried, a part fits.
            alphas = (0.5, 1.5) if value == 1.0 else (0.1, 2.5)
            name = "raw logprobs, at temperature 1" if value == 1.0 else f"another temperature, about {value:g}"
            found.append(Hypothesis(cause, "temperature", name, logprobs, alphas, (1 / temperature, 1 / value)))
        elif kind == "unnormalised":
            name = f"logprobs at temperature 1 divided by {temperature:g}, not normalised again"
            found.append(Hypothesis("raw_logprobs", "temperature", name, logprobs))
        elif float(logprobs.isnan().double().mean()) <= OUTSIDE:
            found.append(Hypothesis("truncated_sampling", "truncation", f"{kind} = {value:g}", logprobs))
    return o, found


def _chunk(logp_CV: Tensor, targets_C1: Tensor, temperature: float) -> dict[tuple[str, float], Tensor]:
    def picked(values_CV: Tensor) -> Tensor:
        return values_CV.gather(1, targets_C1).squeeze(1)

    o_C = picked(logp_CV)
    values = {("o", 0.0): o_C}
    for other in TEMPERATURES:
        if not math.isclose(other, temperature):
            ratio = temperature / other
            values["temperature", other] = o_C * ratio - (logp_CV * ratio).logsumexp(-1)
    if temperature != 1.0:
        raw = values["temperature", 1.0]
        values["unnormalised", 0.0] = raw / temperature
    # The mass that each truncation keeps, and how much lies above the token that was sampled.
    sorted_CV = logp_CV.exp().sort(-1, descending=True).values
    mass_CV = sorted_CV.cumsum(-1)
    rank_C = (logp_CV > o_C[:, None]).sum(-1)
    last = mass_CV.shape[1] - 1
    kept = {("top_p", p): (mass_CV < p).sum(-1) for p in TOP_P}
    kept |= {("top_k", k): torch.full_like(rank_C, k - 1) for k in TOP_K}
    kept |= {("min_p", p): (sorted_CV >= p * sorted_CV[:, :1]).sum(-1) - 1 for p in MIN_P}
    for key, index_C in kept.items():
        index_C = index_C.clamp(0, last)
        mass_C = mass_CV.gather(1, index_C[:, None]).squeeze(1).clamp_max(1)
        values[key] = (o_C - mass_C.log()).masked_fill(rank_C > index_C, torch.nan)
    return values


def of_order(o: Tensor, sequence: Tensor) -> list[Hypothesis]:
    """Logprobs that belong to other tokens, or to no single one, or come in another unit.

    Args:
        o: The trainer's logprobs, float64 ``[N]``.
        sequence: Sequence of each token; those of a sequence stand together and in order, int64 ``[N]``.
    """

    def within(change: Callable[[Tensor], Tensor]) -> Tensor:
        _, lengths = torch.unique_consecutive(sequence, return_counts=True)
        return torch.cat([change(part) for part in torch.split(o, lengths.tolist())]) if len(o) else o

    found = [
        Hypothesis(
            "shifted_logprobs",
            "retokenisation",
            f"logprobs shifted by {abs(lag)} {'forwards' if lag < 0 else 'backwards'} against their tokens",
            within(partial(_shifted, lag=lag)),
        )
        for lag in SHIFTS
    ]
    found.append(
        Hypothesis(
            "shifted_logprobs", "retokenisation", "each sequence's logprobs in reverse", within(lambda p: p.flip(0))
        )
    )
    found += [
        Hypothesis("logprobs_constant", "missing", f"each sequence's {name} for all of its tokens", within(change))
        for name, change in (
            ("mean logprob", lambda p: p.mean().expand(len(p))),
            ("sum of logprobs", lambda p: p.sum().expand(len(p))),
        )
    ]
    found += [
        Hypothesis("logprob_units", "unexplained", f"logarithms to base {base}", o / math.log(base)) for base in (2, 10)
    ]
    return found


def _shifted(values: Tensor, lag: int) -> Tensor:
    """``values[t + lag]``; NaN where there is none."""
    moved = torch.full_like(values, torch.nan)
    if abs(lag) < len(values):
        if lag > 0:
            moved[:-lag] = values[lag:]
        else:
            moved[-lag:] = values[:lag]
    return moved


@dataclass(frozen=True)
class Fit:
    """How well a hypothesis predicts the sampler's logprobs.

    Attributes:
        hypothesis: The hypothesis.
        alpha: Part of ``h - o`` that ``s - o`` is.
        se: Its standard error, by sequences.
        z: How many standard errors of a normal variable ``alpha`` is away from 0: few sequences make a poor estimate
            of the error, so that Student's t of one degree of freedom less than sequences is converted.
        mad: Mean absolute difference between ``s`` and ``h``, nats.
        mad_0: The same between ``s`` and ``o``.
        explained: Part of the mean square of ``s - o`` that is gone between ``s`` and the fitted ``h``.
        tokens: Tokens for which it predicts anything.
    """

    hypothesis: Hypothesis
    alpha: float
    se: float
    z: float
    mad: float
    mad_0: float
    explained: float
    tokens: int

    @property
    def likelihood(self) -> float:
        """``n_eff ln(MAD_0 / MAD)`` with half of the tokens for ``n_eff``: those of a sequence are alike."""
        return 0.5 * self.tokens * math.log(max(self.mad_0, 1e-12) / max(self.mad, 1e-12))

    @property
    def temperature(self) -> float | None:
        """The temperature that fits, to first order in ``1 / T``, if the hypothesis is another temperature."""
        if self.hypothesis.inverse_temperatures is None:
            return None
        here, there = self.hypothesis.inverse_temperatures
        inverse = here + self.alpha * (there - here)
        return 1 / inverse if inverse > 0 else None


def fit(hypothesis: Hypothesis, s: Tensor, o: Tensor, sequence: Tensor) -> Fit | None:
    """Regress ``s - o`` on ``h - o``; None if the hypothesis predicts nothing else than ``o``.

        alpha = <s - o, h - o> / |h - o|^2

    Args:
        hypothesis: The hypothesis.
        s: The sampler's logprobs, float64 ``[N]``.
        o: The trainer's, float64 ``[N]``.
        sequence: Sequence of each token, int64 ``[N]``.
    """
    known = hypothesis.logprobs.isfinite() & s.isfinite() & o.isfinite()
    d, x = (s - o)[known], (hypothesis.logprobs - o)[known]
    squares = float(x.square().sum())
    if len(x) < 2 or squares < 1e-12 * len(x):
        return None
    alpha = float((d * x).sum()) / squares
    rest = d - alpha * x
    _, cluster = torch.unique(sequence[known], return_inverse=True)
    clustered = float(torch.bincount(cluster, x * rest).square().sum()) ** 0.5 / squares
    independent = float((rest.square().mean() / squares).sqrt())
    return Fit(
        hypothesis,
        alpha,
        max(clustered, independent, 1e-9),
        min(
            normal_z(abs(alpha) / max(clustered, 1e-9), int(cluster.max())),
            abs(alpha) / max(independent, 1e-9),
        ),
        float((d - x).abs().mean()),
        float(d.abs().mean()),
        1 - float(rest.square().sum()) / max(float(d.square().sum()), 1e-24),
        len(x),
    )


def normal_z(t: float, degrees: int) -> float:
    """Standard errors of a normal variable that are as unlikely as ``t`` is by Student's distribution.

    Wallace's approximation, within 2.5 % at 5.3 standard errors from 3 degrees on:

        z = (d - 1) sqrt(ln(1 + t^2 / d) / (d - 3/2))

    Args:
        t: Student's variable, at least 0.
        degrees: ``d``; of fewer than 2 nothing is told.
    """
    if degrees < 2:
        return 0.0
    return (degrees - 1) * math.sqrt(math.log1p(t**2 / degrees) / (degrees - 1.5))
