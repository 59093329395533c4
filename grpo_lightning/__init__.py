"""GRPO fine-tuning for PyTorch Lightning, with vLLM rollouts and detectors that name silent failures."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo_lightning.datamodule import RolloutDataModule
    from grpo_lightning.module import GRPOModule
    from grpo_lightning.rollout.episode_settings import EpisodeSettings
    from grpo_lightning.rollout.transformers_engine import TransformersEngine
    from grpo_lightning.rollout.vllm_engine import VLLMEngine

__all__ = ["EpisodeSettings", "GRPOModule", "RolloutDataModule", "TransformersEngine", "VLLMEngine"]

_HOME = {
    "EpisodeSettings": "grpo_lightning.rollout.episode_settings",
    "GRPOModule": "grpo_lightning.module",
    "RolloutDataModule": "grpo_lightning.datamodule",
    "TransformersEngine": "grpo_lightning.rollout.transformers_engine",
    "VLLMEngine": "grpo_lightning.rollout.vllm_engine",
}


def __getattr__(name: str) -> Any:
    # Importing the package must stay cheap: torch and Lightning load with the first class that is used.
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
