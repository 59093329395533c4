"""The numbers of an epoch, from what each update saw."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch

from grpo_lightning.diagnostics import MicroBatchEvidence
from grpo_lightning.metrics.ratio import RatioStats

_PER_TOKEN = {
    "clipped_low": "ppo/clip_fraction_low",
    "clipped_high": "ppo/clip_fraction_high",
    "kl_k1": "ppo/kl_k1",
    "kl_k3": "ppo/kl_k3",
    "entropy": "policy/entropy",
}
"""Sums over trained tokens, and the names of their means."""


class EpochStatistics:
    """Accumulates the updates of one epoch, over all processes; see ``docs/metrics.md`` for each number.

    Args:
        corrected: Whether the loss corrects for the engine, so that what the correction did is counted.
    """

    def __init__(self, corrected: bool = False) -> None:
        self._corrected = corrected
        # Its input comes from all processes already.
        self._ratio = RatioStats(sync_on_compute=False)
        self.reset()

    def reset(self) -> None:
        """Start an epoch."""
        self._ratio.reset()
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._max_k = 0
        self._max_fresh = 0.0

    def add_update(self, evidence: MicroBatchEvidence, input_tokens: int) -> None:
        """Add an optimizer step.

        Args:
            evidence: Its sampled tokens.
            input_tokens: Tokens that went through the model for it.
        """
        d = evidence.log_ratio
        k3 = torch.expm1(d) - d
        self._ratio.update(d)
        self._add(
            {
                "updates": 1,
                "tokens": len(evidence),
                "input_tokens": input_tokens,
                "clipped_low": float(evidence.clipped_low.sum()),
                "clipped_high": float(evidence.clipped_high.sum()),
                "kl_k1": float(-d.sum()),
                "kl_k3": float(k3.sum()),
                "entropy": float(evidence.entropy.sum()),
            }
        )
        if self._corrected:
            self._add(
                {
                    "dropped": float(evidence.dropped.sum()),
                    "capped": float(evidence.capped.sum()),
                    "factor": float(evidence.factor.sum()),
                }
            )
        known = ~evidence.reference_kl.isnan()
        self._add({"reference_tokens": int(known.sum()), "reference_kl": float(evidence.reference_kl[known].sum())})
        k = evidence.updates_since_sampling
        self._max_k = max(self._max_k, int(k.max()) if len(k) else 0)
        fresh = evidence.first_of_rollout & (k == 0)
        if bool(fresh.any()):
            apart = evidence.sampler_log_ratio[fresh]
            self._add(
                {
                    "fresh_tokens": int(fresh.sum()),
                    "fresh_abs": float(apart.abs().sum()),
                    "fresh_k3": float((torch.expm1(apart) - apart).sum()),
                }
            )
            self._max_fresh = max(self._max_fresh, float(apart.abs().max()))

    def _add(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._sums[name] += value

    def compute(self) -> dict[str, float]:
        """The numbers so far."""
        sums = self._sums
        tokens = max(1, sums["tokens"])
        metrics = {f"ppo/ratio_{name}": float(value) for name, value in self._ratio.compute().items()}
        metrics |= {name: sums[key] / tokens for key, name in _PER_TOKEN.items()}
        metrics |= {
            "ppo/updates": sums["updates"],
            "ppo/updates_since_sampling": float(self._max_k),
            "tokens/trained": sums["tokens"],
            "tokens/input": sums["input_tokens"],
        }
        if self._corrected:
            metrics["correction/dropped_fraction"] = sums["dropped"] / tokens
            metrics["correction/truncated_fraction"] = sums["capped"] / tokens
            metrics["correction/weight_mean"] = sums["factor"] / tokens
        if sums["reference_tokens"]:
            metrics["policy/kl_reference"] = sums["reference_kl"] / sums["reference_tokens"]
        if fresh := sums["fresh_tokens"]:
            metrics["mismatch/logprob_abs_mean"] = sums["fresh_abs"] / fresh
            metrics["mismatch/logprob_abs_max"] = self._max_fresh
            metrics["mismatch/kl_k3"] = sums["fresh_k3"] / fresh
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Plain values and a tensor, for a checkpoint in the middle of the epoch."""
        return {
            "ratio": self._ratio.moments,
            "sums": dict(self._sums),
            "max_k": self._max_k,
            "max_fresh": self._max_fresh,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.reset()
        self._ratio.moments = state["ratio"].cpu()
        self._add(state["sums"])
        self._max_k, self._max_fresh = state["max_k"], state["max_fresh"]
