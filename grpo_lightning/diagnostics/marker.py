"""Known weights, so large that an engine either shows them or does not have them."""

import contextlib
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from grpo_lightning.diagnostics.canary import Canary
from grpo_lightning.diagnostics.checks.marker import rms
from grpo_lightning.diagnostics.examination import Run
from grpo_lightning.diagnostics.published import PublishedAdapters
from grpo_lightning.diagnostics.verdict import Status, Verdict
from grpo_lightning.policy import Policy

Weights = Mapping[str, Tensor]
"""A value for each trainable parameter, by name."""

_FIRST_VERSION = 10**9
"""Markers are other weights than the run's, so they get versions of their own, which no run reaches."""

_LORA = re.compile(r"\.lora_[^.]+\.")


def families(policy: Policy) -> dict[str, list[str]]:
    """The trainable parameters, by name, of each kind of module (``q_proj``, ``down_proj``, ...)."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in policy.trainable_parameters():
        module = _LORA.split(name)[0] if policy.has_adapter else name.rsplit(".", 1)[0]
        found[module.rsplit(".", 1)[-1]].append(name)
    return dict(found)


def without_effect(policy: Policy, weights: Weights | None = None) -> dict[str, Tensor]:
    """The weights from which a marker's effect is counted: an adapter that changes nothing, or all weights as they are.

    Args:
        policy: The policy.
        weights: With these the adapter's inner half stays what it is; the policy's own by default.
    """
    current = weights or {name: p.detach() for name, p in policy.trainable_parameters().items()}
    return {name: torch.zeros_like(w) if ".lora_B." in name else w for name, w in current.items()}


def marker(policy: Policy, names: list[str], size: float, seed: int = 0) -> dict[str, Tensor]:
    """Weights with a random change of some parameters, the others without effect.

    All random values are exact in bfloat16: what a marker tells does not depend on the precision it is kept in.

    Args:
        policy: The policy.
        names: The parameters that are changed.
        size: Norm of the change of a module's weight over the norm of that weight.
        seed: Of the random values.
    """
    random = torch.Generator().manual_seed(seed)
    weights = without_effect(policy)

    def noise(like: Tensor, scale: float) -> Tensor:
        values = torch.randn(like.shape, generator=random, dtype=torch.float32) * scale
        return values.to(torch.bfloat16).to(like)

    if not policy.has_adapter:
        for name in names:
            weight = weights[name]
            weights[name] = weight + noise(weight, size * float(weight.float().square().mean().sqrt()))
        return weights
    chosen = set(names)
    for prefix, module in policy.model.named_modules():
        a, b = f"{prefix}.lora_A.default.weight", f"{prefix}.lora_B.default.weight"
        if {a, b} <= chosen:
            rank, inputs = weights[a].shape
            norm = float(module.get_base_layer().weight.detach().float().norm())
            # |scaling * B A| is scaling * sqrt(rank * inputs * outputs) times the sizes of their elements.
            expected = abs(module.scaling["default"]) * (len(weights[b]) * rank) ** 0.5
            weights[a] = noise(weights[a], inputs**-0.5)
            weights[b] = noise(weights[b], size * norm / expected)
    return weights


def scaled(policy: Policy, weights: Weights, factor: float) -> dict[str, Tensor]:
    """The same with their effect on each module's weight multiplied by a factor."""
    origin = without_effect(policy, weights if policy.has_adapter else None)
    return {name: w + factor * (weights[name] - w) for name, w in origin.items()}


def rounded(weights: Weights, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same in a coarser precision."""
    return {name: w.to(dtype).to(w.dtype) for name, w in weights.items()}


@contextlib.contextmanager
def merged(policy: Policy, weights: Weights, dtype: torch.dtype, rounded_first: bool) -> Iterator[None]:
    """Within this context the model is the base with an adapter merged into it in some precision.

    Args:
        policy: The policy.
        weights: The adapter.
        dtype: The precision.
        rounded_first: Whether both are rounded before they are added, and not their sum alone.
    """
    early = dtype if rounded_first else None
    layers: list[Any] = [m for m in policy.model.modules() if "default" in getattr(m, "lora_B", {})]
    with policy._holding(weights), torch.no_grad():
        before = [layer.get_base_layer().weight.data for layer in layers]
        try:
            for layer, weight in zip(layers, before, strict=True):
                delta = layer.get_delta_weight("default").to(weight.device)
                sum_ = weight.to(early or weight.dtype) + delta.to(early or delta.dtype)
                layer.get_base_layer().weight.data = sum_.to(dtype).to(weight.dtype)
            with policy.base():
                yield
        finally:
            for layer, weight in zip(layers, before, strict=True):
                layer.get_base_layer().weight.data = weight


class MarkerBench:
    """Publishes markers the way the run publishes its policy, and asks both sides for the canary under each.

    Args:
        run: The run, its engine synced.
        canary: What is scored.
        files: Reads back what was written; None where nothing is.
    """

    def __init__(self, run: Run, canary: Canary, files: PublishedAdapters | None) -> None:
        assert run.data is not None
        assert run.sync is not None
        self._run, self.canary, self._files = run, canary, files
        self._engine, self._sync = run.data.engine, run.sync
        self._published = 0

    def trained(self, weights: Weights) -> Tensor:
        """What the trainer says of the canary with other weights."""
        with self._run.module.policy._holding(weights):
            return self.canary.trained(self._run)

    def trained_merged(self, weights: Weights, dtype: torch.dtype, rounded_first: bool) -> Tensor:
        """The same with an adapter merged into the base model in some precision, as in `merged`."""
        with merged(self._run.module.policy, weights, dtype, rounded_first):
            return self.canary.trained(self._run)

    def served(self) -> Tensor:
        """What the engine says of the canary with what was published last."""
        return self.canary.served(self._engine)

    def publish(self, weights: Weights) -> Verdict | None:
        """Publish weights as a version of their own; returns what is wrong with what was written, if anything is."""
        module = self._run.module
        version = module.policy_version
        module.policy_version = _FIRST_VERSION + self._published
        self._published += 1
        try:
            with module.policy._holding(weights):
                self._sync.publish(module, self._engine)
                written = None if self._files is None else self._files.written(self._run)
        finally:
            module.policy_version = version
        return written if written is not None and written.status is Status.FAIL else None

    def restore(self, own: Tensor, allowed: float) -> Tensor:
        """Publish the run's own weights again; a publication that is one behind serves them after the second time.

        Args:
            own: What the trainer says of the canary with them ``[N]``.
            allowed: RMS difference that rounding explains, nats.

        Returns:
            What the engine says of the canary after the first time, float64 ``[N]``.
        """
        module = self._run.module
        self._sync.publish(module, self._engine)
        first = self.served()
        if not rms(first - own) <= allowed:
            self._sync.publish(module, self._engine)
        return first
