"""What a truncation that is declared keeps of the trainer's distributions, so that the engine's logprobs compare.

The engine keeps tokens of the mass ``Z`` and renormalises, so that with equal weights ``s = o - log Z``. Rounding can
put a token on the other side of the edge. So there are three sets: the tokens that are surely kept (the core), those
that the trainer itself would keep, and those that may be. ``log Z`` lies between the masses of first and last; and of
the tokens that fall into the core each has its share of the core's mass, wherever the edge is.

Shapes: ``M`` sampled tokens, ``C`` tokens of a chunk, ``V`` vocabulary.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grpo_lightning.diagnostics.hypotheses import Hypothesis, at_temperature
from grpo_lightning.diagnostics.rounding import rounding
from grpo_lightning.diagnostics.scoring import quiet
from grpo_lightning.diagnostics.tally import Tally, tally
from grpo_lightning.functional.truncation import kept_counts
from grpo_lightning.rollout.batch import PackedBatch

if TYPE_CHECKING:
    from grpo_lightning.diagnostics.examination import Run

EDGE = 6.0
"""Roundings by which the odds of a mass move at most: it is a difference of two noisy logarithms."""

EXAMINED_TOKENS = 512
"""Input tokens of the forward pass that a rollout costs."""


@dataclass(frozen=True)
class Kept:
    """Of sampled tokens, what the truncation keeps where they were sampled; float64 ``[M]`` unless said otherwise.

    Attributes:
        ledger_index: Row of the token among the ledger rows of its rollout, int64.
        o: The trainer's logprob of the token, before truncation.
        low: Least ``log Z``.
        log_mass: The trainer's own ``log Z``.
        high: Largest ``log Z``.
        judged: Tokens that say whether the truncation was kept to: those in the core, and those that are surely out,
            bool.
        entropy: Of the core, nats.
        surprisal_variance: Of the core, nats squared.
        mass_above: Share of the core that is likelier than the token.
        core: Logarithm of the core's mass.
    """

    ledger_index: Tensor
    o: Tensor
    low: Tensor
    log_mass: Tensor
    high: Tensor
    judged: Tensor
    entropy: Tensor
    surprisal_variance: Tensor
    mass_above: Tensor
    core: Tensor

    def of(self, chosen: Tensor) -> "Kept":
        """The same of some tokens.

        Args:
            chosen: Which, bool ``[M]``.
        """
        return Kept(**{f.name: getattr(self, f.name)[chosen] for f in fields(Kept)})

    def mass_of(self, ledger_index: Tensor, above: Tensor) -> Tensor:
        """``log Z`` of tokens as far as their logprobs allow it, float64 ``[N]``; NaN for tokens that are not here.

        Args:
            ledger_index: Which tokens, int64 ``[N]``.
            above: ``o - s`` of each, float64 ``[N]``.
        """
        found = torch.full(ledger_index.shape, torch.nan, dtype=torch.float64)
        if not len(self.ledger_index):
            return found
        order = self.ledger_index.argsort()
        rows = self.ledger_index[order]
        place = torch.searchsorted(rows, ledger_index).clamp_max(len(rows) - 1)
        known = rows[place] == ledger_index
        at = order[place[known]]
        found[known] = above[known].nan_to_num().clamp(self.low[at], self.high[at])
        return found

    def tally(self, s: Tensor, chosen: Tensor, generator: torch.Generator) -> Tally:
        """The sums over tokens, within the core.

        Args:
            s: The engine's logprobs, float64 ``[M]``.
            chosen: Tokens that count, bool ``[M]``.
            generator: As for `tally`.
        """
        own = chosen & self.judged
        o = self.o - self.core
        apart = s - (self.o - (self.o - s).clamp(self.low, self.high))
        return tally(
            o[own],
            self.entropy[own],
            self.surprisal_variance[own],
            self.mass_above[own],
            (o + apart)[own],
            generator,
        )


def kept_of(
    distributions: Iterable[Tensor], targets: Tensor, ledger_index: Tensor, *, top_p: float, top_k: int, noise: float
) -> Kept:
    """What is kept where each token was sampled.

    Args:
        distributions: The trainer's log-probabilities, in chunks ``[C, V]``.
        targets: The sampled tokens, int64 ``[M]``.
        ledger_index: Their rows, int64 ``[M]``.
        top_p: The declared mass.
        top_k: The declared number; 0 for none.
        noise: RMS difference in nats of trainer and engine.
    """
    parts: list[dict[str, Tensor]] = []
    start = 0
    for logp_CV in distributions:
        part = slice(start, start + len(logp_CV))
        start = part.stop
        found = _chunk(logp_CV, targets[part], top_p, top_k, EDGE * noise)
        parts.append({name: values.cpu() for name, values in found.items()})
    names = [f.name for f in fields(Kept) if f.name != "ledger_index"]
    return Kept(ledger_index.cpu(), **{name: torch.cat([part[name] for part in parts]) for name in names})


def _chunk(logp_CV: Tensor, targets_C: Tensor, top_p: float, top_k: int, tilt: float) -> dict[str, Tensor]:
    o_C1 = logp_CV.gather(1, targets_C[:, None])
    rank_C = (logp_CV > o_C1).sum(-1)
    sorted_CV = logp_CV.double().exp().sort(-1, descending=True).values
    mass_CV = sorted_CV.cumsum(-1)

    def mass(count_C: Tensor) -> Tensor:
        return mass_CV.gather(1, (count_C[:, None] - 1).clamp_min(0)).squeeze(1).clamp_max(1)

    low_C, own_C, high_C = (
        kept_counts(sorted_CV, top_p=top_p, top_k=top_k, tilt=sign * tilt) for sign in (-1.0, 0.0, 1.0)
    )
    # Of tokens that tie across the core's edge the engine may keep any.
    last = sorted_CV.shape[1] - 1
    first_out_C1 = sorted_CV.gather(1, low_C.clamp_max(last)[:, None])
    core_C = torch.where(low_C > last, low_C, (sorted_CV > first_out_C1).sum(-1))
    core_mass_C = mass(core_C)
    place_V = torch.arange(last + 1, device=logp_CV.device)
    share_CV = (sorted_CV / core_mass_C[:, None]).masked_fill(place_V >= core_C[:, None], 0.0)
    surprisal_CV = -torch.special.xlogy(share_CV, share_CV)
    entropy_C = surprisal_CV.sum(-1)
    squares_C = (surprisal_CV * -share_CV.clamp_min(1e-300).log()).sum(-1)
    above_C = torch.where(rank_C > 0, mass(rank_C), 0.0) / core_mass_C
    return {
        "o": o_C1.squeeze(1).double(),
        "low": mass(low_C).log(),
        "log_mass": mass(own_C).log(),
        "high": mass(high_C).log(),
        "judged": (core_C > 0) & ((rank_C < core_C) | (rank_C >= high_C)),
        "entropy": entropy_C,
        "surprisal_variance": (squares_C - entropy_C.square()).clamp_min(0),
        "mass_above": above_C,
        "core": core_mass_C.log(),
    }


def kept_tokens(run: "Run", batch: PackedBatch, top_p: float, top_k: int) -> Kept:
    """What a declared truncation keeps where a batch's tokens were sampled.

    Args:
        run: The run, its policy with the weights that sampled.
        batch: The tokens, on the policy's device.
        top_p: The declared mass.
        top_k: The declared number; 0 for none.
    """
    with quiet(run):
        raw = run.module.policy.log_distributions(batch.replace(temperature=1.0))
        return kept_of(
            at_temperature(raw, batch.temperature),
            batch.target_ids,
            batch.ledger_index,
            top_p=top_p,
            top_k=top_k,
            noise=rounding(run),
        )


def beside_truncation(hypotheses: Iterable[Hypothesis], o: Tensor, log_mass: Tensor) -> list[Hypothesis]:
    """Hypotheses about logprobs that are truncated on purpose: the others with that, and another truncation.

    Args:
        hypotheses: Those without it.
        o: The trainer's logprobs before truncation, float64 ``[N]``.
        log_mass: Its own ``log Z``, float64 ``[N]``.
    """
    # Raw logprobs are taken before truncation; and another truncation replaces the declared one.
    alone = ("truncated_sampling", "raw_logprobs")
    found = [
        h
        if h.cause in alone
        else Hypothesis(h.cause, h.share, h.name, h.logprobs - log_mass, h.alphas, h.inverse_temperatures)
        for h in hypotheses
    ]
    return [*found, Hypothesis("truncated_sampling", "truncation", "no truncation", o)]
