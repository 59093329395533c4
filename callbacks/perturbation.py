"""Noise on the parameters, for what it is worth."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from grpo_lightning.errors import ConfigurationError
from grpo_lightning.module import GRPOModule


class ParameterPerturbation(Callback):
    """Adds Gaussian noise to the first trainable parameters before each rollout's first update. **Off by default.**

    It makes a check of the ratio's std pass *without any learning*: a stuck policy with a pinch of noise looks
    alive. It is here because some recipes ask for it. The detectors see through it: noise is not an optimizer step,
    so a frozen policy is still reported, and recomputed old logprobs too. But each perturbation counts as a change
    of the policy's version, so the tokens are never fresh, and the checks that compare trainer and engine at equal
    weights have no power: a wrong sync or misaligned logprobs go unseen.

    Args:
        scale: Standard deviation of the noise.
        parameters: How many of the trainable parameters, from the first.
        seed: Seed of the noise.
    """

    def __init__(self, scale: float = 1e-6, parameters: int = 10, seed: int = 0) -> None:
        if not scale > 0 or parameters < 1:
            raise ConfigurationError(f"expected scale > 0 and parameters >= 1, but got {scale} and {parameters}")
        self._scale = scale
        self._parameters = parameters
        self._generator = torch.Generator().manual_seed(seed)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Perturb before the rollout's first micro-batch is computed."""
        if not batch.first_of_rollout:
            return
        assert isinstance(pl_module, GRPOModule)
        with torch.no_grad():
            for parameter in list(pl_module.policy.trainable_parameters().values())[: self._parameters]:
                noise = torch.randn(parameter.shape, generator=self._generator) * self._scale
                parameter.add_(noise.to(parameter))
        pl_module.weights_changed()
