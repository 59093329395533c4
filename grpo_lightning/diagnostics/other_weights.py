"""What the sampler's logprobs would be if the engine held other weights than the trainer."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grpo_lightning.diagnostics.hypotheses import Hypothesis
from grpo_lightning.diagnostics.marker import families
from grpo_lightning.rollout.batch import PackedBatch

if TYPE_CHECKING:
    from grpo_lightning.policy import Policy

SCALES = (0.5, 2.0, 4.0)
"""Wrong scales that are tried; those between fit a part or a multiple of their effect."""

_EXACT = (0.85, 1.15)
"""Parts of a hypothesis's effect that are all of it: other weights are there or not."""


def of_weights(policy: "Policy", batch: PackedBatch, previous: Mapping[str, Tensor] | None) -> list[Hypothesis]:
    """The base model, the adapter with one family of modules switched off or with another scale, the version before.

    One forward pass each, in whatever mode and precision is set.

    Args:
        policy: The policy.
        batch: The tokens.
        previous: The trainable weights of the previous rollout, if there was one.
    """

    def logprobs() -> Tensor:
        return policy.token_logprobs(batch).logprobs.double().cpu()

    found = []
    device = batch.input_ids.device
    if previous is not None:
        with policy._holding({name: p.to(device) for name, p in previous.items()}):
            found.append(
                Hypothesis("sync_stale", "staleness", "the weights of the previous rollout", logprobs(), _EXACT)
            )
    if not policy.has_adapter:
        return found
    with policy.base():
        found.append(Hypothesis("adapter_ignored", "staleness", "the base model", logprobs(), _EXACT))
    weights = {name: p.detach() for name, p in policy.trainable_parameters().items()}
    by_family = {
        family: outputs
        for family, names in families(policy).items()
        if (outputs := [name for name in names if "lora_B" in name])
    }
    outputs = [name for names in by_family.values() for name in names]
    for scale in SCALES:
        with policy._holding({**weights, **{name: scale * weights[name] for name in outputs}}):
            name = f"the adapter with another scale, about {scale:g} times its own"
            found.append(Hypothesis("adapter_scale", "staleness", name, logprobs()))
    if len(by_family) > 1:
        for family, names in by_family.items():
            without = {**weights, **{name: torch.zeros_like(weights[name]) for name in names}}
            with policy._holding(without):
                name = f"the adapter without {family}"
                found.append(Hypothesis("adapter_partial", "staleness", name, logprobs(), _EXACT))
    return found
