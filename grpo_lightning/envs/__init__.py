"""Environments: what the policy acts in, over one turn or many."""

from grpo_lightning.envs.calculator import calculator
from grpo_lightning.envs.environment import (
    Environment,
    EnvironmentFactory,
    InvalidAction,
    Observation,
    SingleTurn,
)
from grpo_lightning.envs.guess_number import GuessNumber
from grpo_lightning.envs.gymnasium import GymnasiumText
from grpo_lightning.envs.openenv import OpenEnv
from grpo_lightning.envs.openenv_client import OpenEnvClient
from grpo_lightning.envs.skyrl_gym import SkyRLGym
from grpo_lightning.envs.textarena import TextArena
from grpo_lightning.envs.tool_environment import ToolEnvironment
from grpo_lightning.envs.tools import ToolResult, ToolSet, tool_schema
from grpo_lightning.envs.trl import TRLEnvironment

__all__ = [
    "Environment",
    "EnvironmentFactory",
    "GuessNumber",
    "GymnasiumText",
    "InvalidAction",
    "Observation",
    "OpenEnv",
    "OpenEnvClient",
    "SingleTurn",
    "SkyRLGym",
    "TRLEnvironment",
    "TextArena",
    "ToolEnvironment",
    "ToolResult",
    "ToolSet",
    "calculator",
    "tool_schema",
]
