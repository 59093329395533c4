"""Weights in the loss that follow what training measures."""

from dataclasses import dataclass, replace
from typing import Self

from grpo_lightning.bounds import require_not_negative, require_positive
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.functional.entropy import active_entropy_coefficient, adaptive_entropy_coefficient
from grpo_lightning.functional.kl import adaptive_coefficient


@dataclass(frozen=True)
class Controls:
    """How the weights of KL and entropy are controlled.

    Attributes:
        kl_target: KL to the reference in nats a token that the weight of the KL aims at; None to keep the weight.
        kl_horizon: Optimizer steps in which it follows.
        entropy_target: Entropy in nats a token below which the weight of the entropy rises; None to keep the weight.
        entropy_step: Change of that weight at each optimizer step.
        entropy_max: Its largest value.
    """

    kl_target: float | None = None
    kl_horizon: float = 100.0
    entropy_target: float | None = None
    entropy_step: float = 1e-3
    entropy_max: float = 0.1

    def check(self, kl_coef: float) -> None:
        """Refuse what could not work.

        Raises:
            ConfigurationError: If a target or its settings are out of range, or there is no weight to begin with.
        """
        names = ("kl_target", "kl_horizon", "entropy_step", "entropy_max")
        require_positive(**{name: value for name in names if (value := getattr(self, name)) is not None})
        if not self.kl_horizon >= 1:
            raise ConfigurationError(f"expected kl_horizon >= 1 optimizer step, but got {self.kl_horizon}")
        if self.entropy_target is not None:
            require_not_negative(entropy_target=self.entropy_target)
        if self.kl_target is not None and not kl_coef > 0:
            raise ConfigurationError("expected kl_coef > 0 beside kl_target: it is the weight to begin with")

    def shown(self, now: "Coefficients") -> dict[str, float]:
        """The weights that are controlled, under their metrics' names."""
        shown = {"policy/kl_coef": now.kl} if self.kl_target is not None else {}
        return shown | ({"policy/entropy_coef": now.entropy_active} if self.entropy_target is not None else {})


@dataclass(frozen=True)
class Coefficients:
    """The weights as they are.

    Attributes:
        kl: Of the KL to the reference.
        entropy: Of the entropy, as its controller remembers it.
        entropy_active: Of the entropy, as it stands in the loss.
    """

    kl: float
    entropy: float
    entropy_active: float

    @classmethod
    def start(cls, kl_coef: float, entropy_coef: float, controls: Controls) -> Self:
        """Before the first update."""
        return cls(kl_coef, entropy_coef, entropy_coef if controls.entropy_target is None else 0.0)

    def after(self, controls: Controls, kl: float | None, entropy: float) -> Self:
        """After an optimizer step.

        Args:
            controls: How they are controlled.
            kl: The step's mean KL to the reference in nats a token; None if it was not computed.
            entropy: Its mean entropy.
        """
        now = self
        if controls.kl_target is not None and kl is not None:
            now = replace(
                now, kl=adaptive_coefficient(now.kl, kl, target=controls.kl_target, horizon=controls.kl_horizon)
            )
        if controls.entropy_target is not None:
            target = controls.entropy_target
            weight = adaptive_entropy_coefficient(
                now.entropy, entropy, target=target, step=controls.entropy_step, high=controls.entropy_max
            )
            active = active_entropy_coefficient(weight, entropy, target=target)
            now = replace(now, entropy=weight, entropy_active=active)
        return now
