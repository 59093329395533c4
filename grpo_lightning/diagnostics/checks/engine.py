"""What the engine is, beside the adapter that it serves: its base model, its caches, and what was published to it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grpo_lightning.diagnostics.checks.mismatch import MISMATCH_MIN
from grpo_lightning.diagnostics.thresholds import Thresholds
from grpo_lightning.diagnostics.verdict import Status, Verdict
from grpo_lightning.rollout.types import Generation

_SCALES = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
_COARSER = (torch.bfloat16, torch.float16)


def check_base(difference: float, allowed: float, tokens: int) -> Verdict:
    """Trainer and engine hold the same base model.

    Args:
        difference: RMS difference of their logprobs of the canary, nats.
        allowed: What rounding explains in their dtypes, nats.
        tokens: Tokens of the canary.
    """
    name = "base agreement"
    shown: dict[str, float | int | str] = {"RMS difference (nats)": difference, "allowed": allowed, "tokens": tokens}
    if difference <= allowed:
        return Verdict(name, Status.PASS, evidence=shown)
    return Verdict(
        name,
        Status.FAIL,
        "Trainer and engine disagree on the base model, without any adapter.",
        "Do both load the same checkpoint, revision and tokenizer? Is the engine's model quantised? If it is that "
        "coarse by design, raise max_mismatch.",
        shown,
        "base_differs",
        ("rounding: the difference is larger than the dtypes of both sides explain",),
    )


def check_published(
    published: Mapping[str, Tensor],
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    own_config: Mapping[str, Any],
    is_earlier: bool,
) -> Verdict:
    """What was written for the engine is the trainer's adapter, bit for bit.

    Args:
        published: Tensors read back, float32.
        config: ``adapter_config.json`` read back.
        weights: The trainer's, under the same names.
        own_config: The trainer's configuration.
        is_earlier: Whether the same tensors were published before, for an earlier version.
    """
    name = "published adapter"
    own = {key: tensor.detach().to("cpu", torch.float32) for key, tensor in weights.items()}
    missing = sorted(own.keys() - published.keys())
    different = [k for k in own.keys() & published.keys() if not torch.equal(own[k], published[k])]
    scales = [k for k in _SCALES if (config.get(k) or None) != (own_config.get(k) or None)]
    shown: dict[str, float | int | str] = {"tensors": len(own), "missing": len(missing), "different": len(different)}
    if not (missing or different or scales):
        return Verdict(name, Status.PASS, evidence=shown)
    if missing:
        cause, message = "adapter_partial", f"{len(missing)} tensors were not published, such as {missing[0]}."
    elif scales:
        shown |= {k: f"{config.get(k)!r}, expected {own_config.get(k)!r}" for k in scales}
        cause, message = "adapter_scale", f"The published adapter_config.json has another {' and '.join(scales)}."
    elif rounding := next((d for d in _COARSER if all(_is_rounded(own[k], published[k], d) for k in different)), None):
        cause, message = "adapter_rounded", f"The adapter is rounded to {str(rounding)[6:]} when it is published."
    elif is_earlier:
        cause, message = "adapter_changed", "What was published is an earlier version of the adapter."
    else:
        names = f"such as {min(different)}"
        cause, message = "adapter_changed", f"{len(different)} published tensors are not the trainer's, {names}."
    fix = "Look at what writes the adapter (LoRAWeightSync.publish, adapters.save_adapter): all tensors, as float32."
    return Verdict(name, Status.FAIL, message, fix, shown, cause)


def _is_rounded(own: Tensor, published: Tensor, dtype: torch.dtype) -> bool:
    return own.shape == published.shape and torch.equal(own.to(dtype).float(), published)


def check_resolution(
    before: Sequence[Tensor], now: Sequence[Tensor], dtype: torch.dtype, limits: Thresholds
) -> Verdict:
    """The engine's precision of the adapter is fine enough for the policy's changes.

        cos(round(now) - round(before), now - before)

    Args:
        before: The adapter's tensors at the last publication that the engine could follow, float32.
        now: The same now.
        dtype: Precision in which the engine is told to keep them.
        limits: Thresholds.
    """
    name = "adapter resolution"
    change = torch.cat([(b - a).flatten().double() for a, b in zip(before, now, strict=True)])
    kept = torch.cat(
        [(b.to(dtype).double() - a.to(dtype).double()).flatten() for a, b in zip(before, now, strict=True)]
    )
    if not float(change.norm()) > 0:
        return Verdict(name, Status.NO_POWER, "The policy did not change since the last publication.")
    cosine = float(change @ kept / (change.norm() * kept.norm()).clamp_min(1e-300))
    shown: dict[str, float | int | str] = {
        "cosine": cosine,
        "least": limits.rounding_cosine,
        "engine's precision": str(dtype).removeprefix("torch."),
        "norm of the change": float(change.norm()),
    }
    if cosine >= limits.rounding_cosine:
        return Verdict(name, Status.PASS, evidence=shown)
    return Verdict(
        name,
        Status.FAIL,
        f"The engine was told to keep the adapter in {str(dtype)[6:]}, in which the policy's updates are lost.",
        "On CPU leave lora_dtype out: the engine then keeps the adapter in float32. On CUDA vLLM takes 16 bits alone: "
        "samples lag behind until the updates add up. A larger learning rate makes that short.",
        shown,
        "adapter_resolution",
        ("large updates: what of this one is left in that precision points elsewhere",),
    )


@dataclass(frozen=True)
class CachePair:
    """One prompt continued greedily twice.

    Attributes:
        warm: With what the cache holds of the prompt.
        cold: With the prompt computed anew.
    """

    warm: Generation
    cold: Generation

    def differences(self) -> Tensor:
        """Of the logprobs up to the first token that differs, nats."""
        pairs = list(zip(self.warm.token_ids, self.cold.token_ids, strict=False))
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs) - 1)
        count = same + 1
        return torch.tensor(self.warm.logprobs[:count]).double() - torch.tensor(self.cold.logprobs[:count]).double()


def check_cache(
    pairs: Sequence[CachePair],
    same_adapter: Sequence[CachePair],
    across: Sequence[CachePair],
    noise_floor: float,
    limits: Thresholds,
) -> Verdict:
    """After a publication nothing is answered from a cache that an older adapter filled.

    Args:
        pairs: Prompts whose cache was filled before the publication, continued after it.
        same_adapter: The same under one adapter: what caching itself changes.
        across: Before the publication (as ``warm``) and after it: what a stale answer could look like.
        noise_floor: RMS difference between engine and trainer at equal weights, nats: what the shape of a batch can
            change where caching happened to change nothing.
        limits: Thresholds.
    """
    name = "prefix cache"

    def size(pairs: Sequence[CachePair]) -> float:
        return float(torch.cat([p.differences() for p in pairs]).square().mean().sqrt())

    found, noise, effect = size(pairs), size(same_adapter), size(across)
    allowed = max(limits.cache_signal * max(noise, noise_floor), MISMATCH_MIN)
    shown: dict[str, float | int | str] = {
        "warm against cold (nats)": found,
        "allowed": allowed,
        "the same under one adapter (nats)": noise,
        "adapter's own effect (nats)": effect,
    }
    if found > allowed:
        return Verdict(
            name,
            Status.FAIL,
            "A prompt that was cached under the previous adapter is answered from that cache under the new one.",
            "Publish each version under a new name and id, or reset the engine's prefix cache at each publication.",
            shown,
            "prefix_cache_stale",
            ("kernels that compute a cached prefix differently: that was measured under one adapter",),
        )
    if effect <= allowed:
        reason = "The publication changes these answers too little; a larger change of the policy would decide."
        return Verdict(name, Status.NO_POWER, reason, evidence=shown)
    return Verdict(name, Status.PASS, evidence=shown)


def check_base_weights(changed: Sequence[str], looked_at: int) -> Verdict:
    """The frozen weights are what they were at the start.

    Args:
        changed: Names of those that are not.
        looked_at: How many were compared in full.
    """
    name = "base weights"
    shown: dict[str, float | int | str] = {"tensors compared in full": looked_at, "changed": len(changed)}
    if not changed:
        return Verdict(name, Status.PASS, evidence=shown)
    return Verdict(
        name,
        Status.FAIL,
        f"Frozen weights of the base model have changed since the run began, such as {changed[0]}.",
        "Merging and unmerging an adapter rounds the base: never merge during training. Look for other writers.",
        shown,
        "base_changed",
    )
