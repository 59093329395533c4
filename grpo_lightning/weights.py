"""Copying whole weights between models."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from grpo_lightning.errors import ConfigurationError


def load_exactly(model: Any, state: Mapping[str, Tensor]) -> None:
    """Copy weights into a model of the same architecture, in its dtype.

    Args:
        model: The causal language model.
        state: Every parameter by its name, tied ones once.

    Raises:
        ConfigurationError: If they are not exactly this model's, by name and shape; nothing is changed then.
    """
    own = dict(model.named_parameters())
    wrong = [name for name in own.keys() | state.keys() if name not in own or name not in state]
    wrong += [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    if wrong:
        raise ConfigurationError(
            f"expected the weights of {type(model).__name__} with {len(own)} parameters, but {len(wrong)} are missing, "
            f"unknown or of another shape: {sorted(wrong)[:4]}; are both from the same model?"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])
