"""Environments: what the policy acts in, over one turn or many."""

from grpo_lightning.envs.environment import (
    Environment,
    EnvironmentFactory,
    InvalidAction,
    Observation,
    SingleTurn,
)

__all__ = ["Environment", "EnvironmentFactory", "InvalidAction", "Observation", "SingleTurn"]
