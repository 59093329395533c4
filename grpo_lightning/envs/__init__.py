"""Environments: what the policy acts in, over one turn or many."""

from grpo_lightning.envs.calculator import calculator
from grpo_lightning.envs.environment import (
    Environment,
    EnvironmentFactory,
    InvalidAction,
    Observation,
    SingleTurn,
)
from grpo_lightning.envs.tool_environment import ToolEnvironment
from grpo_lightning.envs.tools import ToolResult, ToolSet, tool_schema

__all__ = [
    "Environment",
    "EnvironmentFactory",
    "InvalidAction",
    "Observation",
    "SingleTurn",
    "ToolEnvironment",
    "ToolResult",
    "ToolSet",
    "calculator",
    "tool_schema",
]
