"""Truncated sampling is allowed only with a correction that takes it back."""

from collections.abc import Callable
from functools import partial
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from grpo_lightning.errors import ConfigurationError
from grpo_lightning.functional.correction import CORRECTIONS, COVERS_TRUNCATION
from grpo_lightning.named import name_of


def check_range(top_p: float, top_k: int) -> None:
    """Refuse bounds that mean nothing.

    Raises:
        ConfigurationError: Naming the setting.
    """
    if not 0 < top_p <= 1:
        raise ConfigurationError(f"expected 0 < top_p <= 1, where 1 keeps all tokens, but got {top_p}")
    if isinstance(top_k, bool) or top_k != int(top_k) or top_k < 0:
        raise ConfigurationError(f"expected top_k to be a whole number >= 0, where 0 keeps all tokens, but got {top_k}")


def check_truncation(top_p: float, top_k: int, correction: Callable[..., Any] | None) -> None:
    """Refuse truncated sampling of which the loss knows nothing.

    Args:
        top_p: Mass that sampling keeps.
        top_k: Tokens that it keeps; 0 for all.
        correction: That of the `Objective`, with or without its settings.

    Raises:
        ConfigurationError: If there is no correction that holds the ratio.
    """
    if top_p == 1 and top_k == 0:
        return
    function = correction.func if isinstance(correction, partial) else correction
    name = next((name for name, known in CORRECTIONS.items() if known is function), name_of(function))
    if function is not None and function not in CORRECTIONS.values():
        rank_zero_warn(
            f"Sampling is truncated (top_p={top_p:g}, top_k={top_k}), and correction={name!r} is not one of "
            "ours: it must weight each token by trainer / engine, or the loss has the wrong gradient."
        )
        return
    covering = [known for known in CORRECTIONS if known in COVERS_TRUNCATION]
    if name not in covering:
        raise ConfigurationError(
            f"truncated sampling (top_p={top_p:g}, top_k={top_k}) draws from another distribution than the one that "
            f"the trainer differentiates: expected GRPOModule's correction to be one of {', '.join(covering)}, whose "
            f"weights hold the ratio of the two, but got {name!r}"
        )
